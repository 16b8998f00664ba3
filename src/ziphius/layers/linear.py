"""Linear layers and the vocabulary's two ends: which part of a matrix each rank keeps, whatever its format."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ziphius.errors import ConfigError
from ziphius.layers.context import LayerContext
from ziphius.layers.layer import CheckpointTensor, Layer, Shard
from ziphius.layers.weights import MatrixPart, Norm


class Linear(Layer):
    """y = x W^T + b, where W's rows come from one or more matrices of the checkpoint (`parts`)."""

    def __init__(self, parts: Sequence[MatrixPart], in_features: int, bias: bool, context: LayerContext) -> None:
        self._parts = tuple(parts)
        self._context = context
        out_features = sum(part.rows for part in parts)
        self.weight = context.linear_format.linear(out_features, in_features, context.device)
        self.bias = torch.empty(out_features, dtype=context.dtype, device=context.device) if bias else None

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, in of this rank] -> [T, out of this rank]."""
        y = self.weight(x)
        return y if self.bias is None else y.add_(self.bias)

    def after_norm(self, x: Tensor, norm: Norm) -> Tensor:
        """self(norm(x))."""
        y = self.weight.after_norm(x, norm)
        return y if self.bias is None else y.add_(self.bias)

    def checkpoint_tensors(self, *names: str) -> Iterator[CheckpointTensor]:
        """`names`: each part's name in the checkpoint, without `.weight`."""
        for name, part in zip(names, self._parts, strict=True):
            yield from self.weight.checkpoint_tensors(name, part)
            if self.bias is not None:
                yield self._bias_tensor(self.bias, name, part)

    def _bias_tensor(self, bias: Tensor, name: str, part: MatrixPart) -> CheckpointTensor:
        # A row-parallel shard cuts the input, which the bias does not have.
        shard = part.shard if part.shard is not None and part.shard.dim == 0 else None
        target = bias[part.start : part.start + part.rows]
        return CheckpointTensor(f"{name}.bias", part.shape[:1], shard, lambda t: _fill(target, t))


class ReplicatedLinear(Linear):
    """Every rank has the whole matrix. Several outputs are merged into one product."""

    def __init__(self, in_features: int, outs: Sequence[int], context: LayerContext, *, bias: bool = False) -> None:
        super().__init__(_stack([(out, None) for out in outs], in_features), in_features, bias, context)


class MergedColumnParallelLinear(Linear):
    """Each of the merged matrices gives every rank an equal share of its outputs."""

    def __init__(self, in_features: int, outs: Sequence[int], context: LayerContext, *, bias: bool = False) -> None:
        cuts = [(out, _output_share(out, context)) for out in outs]
        super().__init__(_stack(cuts, in_features), in_features, bias, context)


class ColumnParallelLinear(MergedColumnParallelLinear):
    """Every rank has an equal share of the outputs."""

    def __init__(self, in_features: int, out_features: int, context: LayerContext, *, bias: bool = False) -> None:
        super().__init__(in_features, [out_features], context, bias=bias)


class PartlyParallelLinear(Linear):
    """Every rank has an equal share of the first matrix's outputs, and all of the others."""

    def __init__(self, in_features: int, parallel_out: int, outs: Sequence[int], context: LayerContext) -> None:
        first = (parallel_out, _output_share(parallel_out, context))
        cuts = [first, *((out, None) for out in outs)]
        super().__init__(_stack(cuts, in_features), in_features, False, context)


class QKVParallelLinear(Linear):
    """q, k and v in one product. Ranks share the heads; with more ranks than KV heads these are replicated."""

    def __init__(
        self, hidden: int, heads: int, kv_heads: int, head_dim: int, context: LayerContext, *, bias: bool = False
    ) -> None:
        parallel = context.parallel
        self.heads = parallel.shard(heads, "num_attention_heads")
        self.kv_heads = parallel.shard_kv_heads(kv_heads)
        self.head_dim = head_dim
        first_kv_head = parallel.rank * kv_heads // parallel.size
        q = Shard(0, parallel.rank * self.heads * head_dim, self.heads * head_dim)
        kv = Shard(0, first_kv_head * head_dim, self.kv_heads * head_dim)
        block = context.linear_format.block
        require_whole_blocks("num_attention_heads x head_dim", heads * head_dim, q, block)
        require_whole_blocks("num_key_value_heads x head_dim", kv_heads * head_dim, kv, block)
        cuts = [(heads * head_dim, q), (kv_heads * head_dim, kv), (kv_heads * head_dim, kv)]
        super().__init__(_stack(cuts, hidden), hidden, bias, context)

    def split(self, qkv: Tensor) -> tuple[Tensor, Tensor]:
        """[T, out] -> views qk [T, heads + kv_heads, D], to be rotated together, and v [T, kv_heads, D]."""
        heads = qkv.view(qkv.shape[0], -1, self.head_dim)
        qk, v = heads.split_with_sizes([self.heads + self.kv_heads, self.kv_heads], dim=1)
        return qk, v

    def split_qk(self, qk: Tensor) -> tuple[Tensor, Tensor]:
        """[T, heads + kv_heads, D] -> views q [T, heads, D] and k [T, kv_heads, D]."""
        q, k = qk.split_with_sizes([self.heads, self.kv_heads], dim=1)
        return q, k


class RowParallelLinear(Linear):
    """Every rank has an equal share of the inputs; the partial outputs are summed over the ranks."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        context: LayerContext,
        *,
        bias: bool = False,
        reduce: bool = True,
    ) -> None:
        """`reduce` False leaves the sum over ranks to the caller; a bias is then not possible."""
        if bias and not reduce:
            raise ValueError("a bias may be added only after the sum over ranks")
        share = equal_share(in_features, 1, context, "input size")
        require_whole_blocks("input size", in_features, share, context.linear_format.block)
        part = MatrixPart((out_features, in_features), share, 0)
        super().__init__([part], share.length, bias, context)
        self._reduce = reduce

    def __call__(self, x: Tensor) -> Tensor:
        y = self.weight(x)
        if self._reduce:
            y = self._context.parallel.all_reduce(y)
        return y if self.bias is None else y.add_(self.bias)

    def onto(self, x: Tensor, residual: Tensor) -> Tensor:
        """residual + self(x); `residual` may be overwritten."""
        if self._context.parallel.size == 1 and self.bias is None:
            return self.weight.onto(x, residual)
        return residual + self(x)


class VocabParallelEmbedding(Layer):
    """Turns token ids into rows. Every rank has an equal share of the vocabulary."""

    def __init__(self, vocab_size: int, hidden_size: int, context: LayerContext) -> None:
        self._context = context
        self._shape = (vocab_size, hidden_size)
        self.shard = equal_share(vocab_size, 0, context, "vocab_size")
        self.weight = torch.empty((self.shard.length, hidden_size), dtype=context.dtype, device=context.device)

    def __call__(self, ids: Tensor) -> Tensor:
        """ids [T] int64 -> [T, hidden]."""
        if self._context.parallel.size == 1:
            return F.embedding(ids, self.weight)
        local = ids - self.shard.start
        elsewhere = (local < 0) | (local >= self.shard.length)
        rows = F.embedding(local.masked_fill(elsewhere, 0), self.weight)
        return self._context.parallel.all_reduce(rows.masked_fill_(elsewhere.unsqueeze(1), 0))

    def checkpoint_tensors(self, name: str) -> Iterator[CheckpointTensor]:
        yield CheckpointTensor(f"{name}.weight", self._shape, self.shard, lambda t: _fill(self.weight, t))


class ParallelLMHead(Layer):
    """Turns hidden rows into logits. Every rank computes an equal share of the vocabulary, and then gathers them all.

    A head that is tied to an embedding shares the embedding's memory where the format allows it; otherwise it keeps
    a copy in its own format.
    """

    def __init__(self, embedding: VocabParallelEmbedding, tied: bool, context: LayerContext) -> None:
        self._context = context
        rows, columns = embedding.weight.shape
        shared = context.linear_format.tied(embedding.weight) if tied else None
        self.weight = shared or context.linear_format.head(rows, columns, context.dtype, context.device)
        self._reads_checkpoint = shared is None
        vocab = rows * context.parallel.size
        self._part = MatrixPart((vocab, columns), embedding.shard, 0)

    def __call__(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """[n, hidden] -> [n, vocab] float32, in `out` where it is given."""
        logits = self._context.parallel.all_gather(self.weight(hidden))
        return logits.float() if out is None else out.copy_(logits)

    def checkpoint_tensors(self, name: str) -> Iterator[CheckpointTensor]:
        """`name` is the head's, or the embedding's where the two are tied."""
        if self._reads_checkpoint:
            yield from self.weight.checkpoint_tensors(name, self._part)


def equal_share(total: int, dim: int, context: LayerContext, what: str) -> Shard:
    """This rank's share of `total` along dimension `dim`. ConfigError names `what` when the ranks do not divide it."""
    length = context.parallel.shard(total, what)
    return Shard(dim, context.parallel.rank * length, length)


def require_whole_blocks(what: str, total: int, share: Shard, block: tuple[int, int]) -> None:
    """ConfigError when `share` cuts a block of [out, in] weights that have one scale; it names `what`.

    The whole dimension cuts none: its last block may be shorter.
    """
    side = block[share.dim]
    if share.length != total and share.length % side:
        raise ConfigError(
            f"{what} {total}: a rank's share of {share.length} is not a multiple of {side}, the block of the weights "
            f"format along the {'output' if share.dim == 0 else 'input'}",
            param="tp",
        )


def _output_share(out: int, context: LayerContext) -> Shard:
    share = equal_share(out, 0, context, "output size")
    require_whole_blocks("output size", out, share, context.linear_format.block)
    return share


def _stack(cuts: Sequence[tuple[int, Shard | None]], in_features: int) -> list[MatrixPart]:
    """The parts of a weight in which matrices [out, in_features] follow one another, each with this rank's share."""
    parts: list[MatrixPart] = []
    start = 0
    for out, shard in cuts:
        parts.append(MatrixPart((out, in_features), shard, start))
        start += parts[-1].rows
    return parts


def _fill(target: Tensor, value: Tensor) -> None:
    target.copy_(value)
