"""ScheduledBatch to ForwardBatch: tokens, positions, slots and pages, by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ziphius.engine.row_table import RowTable
from ziphius.ipc.messages import NewRow, RowWork, SamplingParams


def new_row(row: int, pages: list[int], prompt: list[int], **options: Any) -> NewRow:
    sampling = SamplingParams(max_new_tokens=9, seed=0, **options)
    return NewRow(row=row, pages=pages, prompt_ids=prompt, output_ids=[], sampling=sampling)


def work(row: int, position: int, token_ids: list[int], new_pages: list[int], sample: bool = True) -> RowWork:
    return RowWork(row=row, position=position, token_ids=token_ids, new_pages=new_pages, sample=sample)


def table() -> RowTable:
    return RowTable(4, 8, 4, torch.device("cpu"))


def test_a_mixed_step() -> None:
    rows = table()
    for row, pages in ((0, [5]), (3, [1, 6]), (1, [2])):
        rows.start(new_row(row, pages, [0] * 20))
    rows.store(np.array([3, 0]), torch.tensor([77, 88]))
    plan = rows.plan(
        [
            work(3, 8, [], [7]),
            work(0, 2, [], []),
            work(1, 4, [10, 11, 12, 13, 14], [3, 4], sample=False),
            work(2, 0, [20], [0]),
        ]
    )
    forward = plan.forward
    assert forward.input_ids.tolist() == [77, 88, 10, 11, 12, 13, 14, 20]
    assert forward.positions.tolist() == [8, 2, 4, 5, 6, 7, 8, 0]
    assert forward.slots.tolist() == [28, 22, 12, 13, 14, 15, 16, 0]
    assert forward.num_decodes == 2
    assert forward.query_starts == [0, 1, 2, 7, 8]
    assert forward.seq_lens == forward.seq_lens_device.tolist() == [9, 3, 9, 1]
    assert (forward.page_table.dtype, forward.seq_lens_device.dtype) == (torch.int32, torch.int32)
    assert [row[:n].tolist() for row, n in zip(forward.page_table, (3, 1, 3, 1), strict=True)] == [
        [1, 6, 7],
        [5],
        [2, 3, 4],
        [0],
    ]
    assert plan.sample_rows.tolist() == [3, 0, 2]
    assert forward.sample_indices.tolist() == [0, 1, 7]
    assert plan.prompt_logprobs == []


def test_a_row_taken_over_starts_with_its_own_pages() -> None:
    rows = table()
    rows.start(new_row(0, [4, 5, 6], [0] * 12))
    rows.start(new_row(0, [2], [0] * 5))
    plan = rows.plan([work(0, 4, [9], [3])])
    assert plan.forward.slots.tolist() == [12]
    assert plan.forward.page_table.tolist() == [[2, 3]]


def test_prompt_logprobs_of_a_chunked_prompt() -> None:
    """Position p's logits tell of the prompt's token at p + 1; the last position tells of the answer."""
    rows = table()
    prompt = [10, 11, 12, 13, 14, 15]
    rows.start(new_row(0, [], prompt, prompt_logprobs_from=0, logprobs=True, top_logprobs=3))
    rows.start(new_row(1, [], [30, 31]))
    plan = rows.plan([work(1, 0, [30, 31], [7]), work(0, 0, prompt[:4], [0], sample=False)])
    (scored,) = plan.prompt_logprobs
    assert (scored.first_token, list(scored.tokens), scored.targets) == (10, [2, 3, 4, 5], [11, 12, 13, 14])
    assert (scored.row, scored.num_top) == (0, 3)
    assert plan.forward.sample_indices.tolist() == [1, 2, 3, 4, 5]
    plan = rows.plan([work(0, 4, prompt[4:], [1])])
    (scored,) = plan.prompt_logprobs
    assert (scored.first_token, list(scored.tokens), scored.targets) == (None, [0], [15])
    assert plan.forward.sample_indices.tolist() == [1, 0]
    assert rows.plan([work(0, 6, [], [])]).prompt_logprobs == []


def test_prompt_logprobs_from_the_middle() -> None:
    rows = table()
    prompt = [10, 11, 12, 13, 14, 15]
    rows.start(new_row(0, [], prompt, prompt_logprobs_from=4))
    assert rows.plan([work(0, 0, prompt[:3], [0], sample=False)]).prompt_logprobs == []
    (scored,) = rows.plan([work(0, 3, prompt[3:], [1])]).prompt_logprobs
    assert (scored.first_token, list(scored.tokens), scored.targets) == (None, [0, 1], [14, 15])


def test_a_prompt_of_one_token_has_a_logprob_to_tell_of_nothing() -> None:
    rows = table()
    rows.start(new_row(0, [], [10], prompt_logprobs_from=0))
    (scored,) = rows.plan([work(0, 0, [10], [0])]).prompt_logprobs
    assert (scored.first_token, list(scored.tokens), scored.targets) == (10, [], [])
