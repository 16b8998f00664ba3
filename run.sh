#!/usr/bin/env bash
# Makes .venv with Ziphius in it, when it is missing or pyproject.toml has changed, and hands over to `ziphius`.
#   ./run.sh start | status | logs | chat | stop | ...    the ziphius command
#   ./run.sh test [pytest arguments]                      linters, types and tests (-n 0: in one process)
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
venv=$root/.venv
log=$venv/install.log

say() { printf '%s\n' "$*" >&2; }

die() {
  say "run.sh: $1"
  shift
  for line in "$@"; do say "  $line"; done
  exit 1
}

# The first Python that is new enough. PYTHON=... chooses another.
find_python() {
  local candidate
  for candidate in ${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11}; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      command -v "$candidate"
      return
    fi
  done
  die "Python 3.11 or newer is needed${PYTHON:+, and PYTHON=$PYTHON is not}." \
    "Debian, Ubuntu:  sudo apt install python3 python3-venv" \
    "Fedora:          sudo dnf install python3" \
    "Installed elsewhere:  PYTHON=/path/to/python3 ./run.sh ..."
}

make_venv() {
  local python=$1 version output remedy
  version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
  remedy="Debian, Ubuntu:  sudo apt install python3-venv   (or python$version-venv)"
  # Debian keeps ensurepip in a package of its own; without it a virtual environment has no pip.
  "$python" -c 'import venv, ensurepip' 2>/dev/null || die "$python has no venv module." "$remedy"
  say "Making a virtual environment in $venv with Python $version"
  if ! output=$("$python" -m venv --clear "$venv" 2>&1 && "$venv/bin/python" -m pip --version 2>&1); then
    die "the virtual environment could not be made:" "$(tail -n 4 <<<"$output")" "$remedy"
  fi
}

# pip's own words, shortened: one moving line in a terminal, else a line for each large download.
show_progress() {
  local line large='^Downloading .*\(([0-9.]+ GB|[0-9]{2,}(\.[0-9]+)? MB)\)'
  while IFS= read -r line; do
    line=${line#"${line%%[! ]*}"}
    case $line in
      Collecting* | Downloading* | Processing* | Building* | Preparing* | Installing*) ;;
      *) continue ;;
    esac
    if [ -t 2 ]; then
      printf '\r\033[K  %s' "${line:0:76}" >&2
    elif [[ $line =~ $large || $line == Installing\ collected* ]]; then
      say "  ${line:0:76}"
    fi
  done
  [ ! -t 2 ] || printf '\r\033[K' >&2
}

install() {
  say "Installing Ziphius and what it needs (minutes the first time; details in $log)"
  if ! "$venv/bin/python" -m pip install --disable-pip-version-check --no-input --progress-bar off -e "$1" 2>&1 |
    tee "$log" | show_progress; then
    die "the installation failed; the next call tries again." "$(grep -i error "$log" | tail -n 4)" "All of it: $log"
  fi
}

# $1: the optional extra, or nothing. The stamp says what was installed, and is written last, so that an
# interrupted installation is done again.
bootstrap() {
  local extra=$1 python stamp file="$venv/.installed-$1"
  stamp="$root $(cksum <"$root/pyproject.toml")"
  installed() { [ -x "$venv/bin/python" ] && [ "$(cat "$file" 2>/dev/null)" = "$stamp" ]; }
  installed && return
  python=$(find_python)
  mkdir -p "$venv"
  exec 9<"$venv"
  if command -v flock >/dev/null && ! flock -n 9; then
    say "Another run.sh is installing; waiting for it"
    flock 9
  fi
  if ! installed; then
    # Broken, or made for another folder: it is made anew rather than mended.
    if [ "$(cat "$venv/.root" 2>/dev/null)" != "$root" ] || ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
      make_venv "$python"
      printf '%s\n' "$root" >"$venv/.root"
    fi
    rm -f "$venv"/.installed-*
    install "$root${extra:+[$extra]}"
    # With an extra, what goes without it is there too.
    printf '%s\n' "$stamp" >"$venv/.installed-"
    [ -z "$extra" ] || cp "$venv/.installed-" "$file"
  fi
  exec 9<&-
}

run_tests() {
  cd "$root"
  say "ruff"
  "$venv/bin/ruff" check --quiet .
  "$venv/bin/ruff" format --check --quiet .
  say "mypy"
  "$venv/bin/mypy"
  say "pytest"
  exec "$venv/bin/python" -m pytest "$@"
}

if [ "${1:-}" = test ]; then
  shift
  bootstrap test
  run_tests "$@"
else
  bootstrap ""
  exec "$venv/bin/ziphius" "$@"
fi
