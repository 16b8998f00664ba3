#!/usr/bin/env bash
# install_slurm.sh PREFIX : Slurm's daemons and commands, and munge, in a folder of their own, from Debian's packages.
#
# For tests of `ziphius slurm` on one machine: it configures and starts nothing. Needs apt with current lists and dpkg-deb.
set -euo pipefail

prefix=${1:?usage: install_slurm.sh PREFIX}
mkdir -p "$prefix"
prefix=$(cd "$prefix" && pwd)
exec 9<"$prefix"
! command -v flock >/dev/null || flock 9 # two at once would work in the same place
[ ! -e "$prefix/.installed" ] || exit 0
die() { printf 'install_slurm.sh: %s\n' "$*" >&2; exit 1; }
for needed in apt-get dpkg-deb; do
  command -v "$needed" >/dev/null || die "$needed is needed"
done

work=$(mktemp -d "$prefix/.work.XXXXXX")
trap 'rm -rf "$work"' EXIT
packages=(slurmctld slurmd slurm-client slurm-wlm-basic-plugins munge libmunge2 libhwloc15)
fetch() { (cd "$work" && apt-get -q -o Acquire::Retries=5 -o APT::Sandbox::User=root download "${packages[@]}" >log 2>&1); }
for try in 1 2 3; do
  fetch && break
  [ "$try" -lt 3 ] || die "Debian's packages could not be fetched: $(tail -n 1 "$work/log")"
  # Lists that are old name packages that the mirror has no more.
  apt-get -q -o Acquire::Retries=5 update >"$work/log" 2>&1 || sleep 5
done
for deb in "$work"/*.deb; do dpkg-deb -x "$deb" "$prefix"; done
for program in slurmctld slurmd slurmstepd; do
  # Debian chooses between builds by /etc/alternatives.
  [ ! -e "$prefix/usr/sbin/$program-wlm" ] || ln -sf "$program-wlm" "$prefix/usr/sbin/$program"
done
libraries=$(dirname "$(find "$prefix" -name libslurmfull.so | head -n 1)")
missing=$(LD_LIBRARY_PATH=$libraries:$(dirname "$libraries") ldd "$prefix"/usr/sbin/slurm{ctld,d} "$prefix/usr/sbin/munged" |
  grep 'not found' || true)
[ -z "$missing" ] || die "libraries are missing: $missing"
echo "$libraries" >"$prefix/.installed"
