#!/usr/bin/env bash
# Makes what ./dev bench cpu runs, in build/bench. What is there and newer than its sources is not made again.
#   bench         the workloads, one static program           kernel, shell.img  of the test guests (tests/guest/build.sh)
#   initrd.img    the test guests' initrd, with bench as init
#   disk.img      256 MiB; each block of 4 KiB begins with its own number
# With the argument "programs" also, as root:
#   rootfs        Debian bookworm with the programs of bench/cpu/programs/list and the files that they work on
#   programs.img  the same as an ext4 file system
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$here/../..
guest=$("$root/tests/guest/build.sh")
mkdir -p "$root/build/bench"
cd "$root/build/bench"
export PATH=$PATH:/usr/sbin:/sbin

die() { echo "bench/cpu/build.sh: $*" >&2; exit 1; }

newer_than() {  # newer_than FILE SOURCE...: FILE is there and no source is newer
  local file=$1 source
  shift
  for source in "$@"; do [[ $file -nt $source ]] || return 1; done
}

make_initrd() {  # Linux unpacks archives that follow one another; the later one's init wins
  rm -rf initramfs
  mkdir -p initramfs/{mnt,tmp}
  strip -o initramfs/init bench
  { cat "$guest/initrd.img"; (cd initramfs && find . | sort | cpio --quiet -o -H newc -R 0:0); } > initrd.img.new
  mv initrd.img.new initrd.img
}

make_disk() {
  python3 - disk.img.new <<'END'
import struct, sys
with open(sys.argv[1], "wb") as disk:
    pad = bytes((i * 37) & 255 for i in range(4088))
    for block in range(256 * 256):
        disk.write(struct.pack("<Q", block) + pad)
END
  mv disk.img.new disk.img
}

make_rootfs() {
  local mirror
  mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 'Codename: bookworm' | sed -n 1p)
  rm -rf rootfs
  debootstrap --variant=minbase --include=python3-minimal,openssl,sqlite3,gcc,libc6-dev,perl-base bookworm rootfs \
    ${mirror:+"$mirror"} >&2
  rm -rf rootfs/var/cache/apt/* rootfs/var/lib/apt/lists/* rootfs/usr/share/{doc,locale,man}/*
  mkdir rootfs/bench
  openssl genrsa -out rootfs/bench/key.pem 2048
  { openssl enc -aes-128-ctr -K 00 -iv 00 -in /dev/zero 2> /dev/null || true; } | head -c 33554432 > rootfs/bench/random
  touch rootfs/bench/complete
}

make_programs() {
  cp "$here"/programs/* "$here"/guest/{integer.c,bench.h} rootfs/bench/
  rm -f programs.img.new
  truncate -s 700M programs.img.new
  mkfs.ext4 -q -F -O ^has_journal -d rootfs programs.img.new
  mv programs.img.new programs.img
}

ln -sfn "$guest/vmlinuz" kernel
ln -sfn "$guest/initrd.img" shell.img
newer_than bench "$here"/guest/* "$here/build.sh" ||
  gcc -O2 -fno-strict-aliasing -Wall -Wextra -static -o bench "$here"/guest/*.c -llua5.4 -lz -lm -lpthread
newer_than initrd.img bench "$guest/initrd.img" || make_initrd
[[ -f disk.img ]] || make_disk
if [[ ${1:-} == programs ]]; then
  [[ $(id -u) == 0 ]] || die "the real programs need root (debootstrap, chroot); --no-real leaves them out"
  [[ -f rootfs/bench/complete ]] || make_rootfs
  newer_than programs.img rootfs/bench/complete "$here"/programs/* "$here"/guest/{integer.c,bench.h} || make_programs
fi
