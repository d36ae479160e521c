#!/usr/bin/env bash
# Assembles the guests of the end-to-end tests from Debian's packages. No root, no loop devices, nothing installed.
set -euo pipefail
export LC_ALL=C

usage() {
  cat <<'END'
usage: tests/guest/build.sh [--help]

Assembles the test guests and prints the directory that they are in:

  vmlinuz      Debian's cloud kernel (bzImage, of linux-image-cloud-amd64)
  vmlinux      the same kernel unpacked (ELF with a PVH note)
  initrd.img   busybox, diskload (of diskload.cpp) and the virtio modules; its init acts by words on the kernel command line:
                 kvartz.demo       show the kernel, the disk /dev/vda (overwritten!), the network; power off
                 kvartz.run="CMD"  run CMD with sh, print "kvartz: exit status N", power off
                 root=/dev/vda1    start that file system's /sbin/init
                 kvartz.reboot     reboot where the above powers off (machines without ACPI)
                 (none)            a shell on the console
               it prints "kvartz: userspace" as soon as it runs
  disk.img     64 MiB: MBR, GRUB (serial), ext4 with that kernel, and a busybox userland that asks for a login on
               ttyS0 (root, no password); to be used as a virtio disk, on a copy
  rescue.img   GRUB's rescue image as Debian makes it (of grub-rescue-pc), on the firmware's console; to be used likewise

The directory is $KVARTZ_CACHE/guests/<key> (KVARTZ_CACHE: ~/.cache/kvartz unless set); $KVARTZ_CACHE/guests/current
always leads to the newest. The key changes with the packages' versions and with this script. What is there is not made
again, and needs no network.
END
}

die() { echo "tests/guest/build.sh: $*" >&2; exit 1; }

case "${1:-}" in
  "") ;;
  --help | -h) usage; exit ;;
  *) die "unknown argument '$1'; see --help" ;;
esac

here=$(cd "$(dirname "$0")" && pwd)
cache=${KVARTZ_CACHE:-$HOME/.cache/kvartz}/guests
packages=$cache/packages
modules=(virtio_pci virtio_mmio virtio_blk virtio_net virtio_console virtio_balloon virtio-rng button evdev)
export PATH=$PATH:/usr/sbin:/sbin
for tool in dpkg-deb lz4 mkfs.ext4 flock g++; do
  command -v $tool > /dev/null || die "$tool is missing; run ./dev setup"
done
mkdir -p "$packages"
exec 9> "$cache/lock"
flock 9

# fetch NAME...: sets debs to the paths of the packages, in the versions that apt would install, downloaded when they are
# not in the cache. Without apt's lists or a network the newest ones in the cache serve.
fetch() {
  local name file files missing=()
  files=$(apt-get download --print-uris "$@" 2> /dev/null | awk '{print $2}') || files=
  for file in $files; do
    [[ -f $packages/$file ]] || missing+=("${file%%_*}")
  done
  if ((${#missing[@]})); then
    (cd "$packages" && apt-get download -qq -o APT::Sandbox::User="$(id -un)" "${missing[@]}" >&2) || true
  fi
  for name in "$@"; do
    file=$(grep "^${name}_" <<< "$files") || true
    [[ -n $file && -f $packages/$file ]] || file=$(cd "$packages" && ls -t "${name}"_*.deb 2> /dev/null | sed -n 1p)
    [[ -n $file ]] || die "cannot download the package $name; run ./dev setup, or look at the network"
    debs+=("$packages/$file")
  done
}

kernel_package() {  # the name of the newest cloud kernel's package
  local name
  name=$(apt-cache depends linux-image-cloud-amd64 2> /dev/null | awk '/Depends: linux-image/ {print $2; exit}')
  [[ -n $name ]] || name=$(ls -t "$packages"/linux-image-*-cloud-amd64_*.deb 2> /dev/null | sed -n '1s|.*/\([^_]*\)_.*|\1|p')
  [[ -n $name ]] || die "apt does not know linux-image-cloud-amd64; run ./dev setup"
  echo "$name"
}

kernel_name=$(kernel_package)
debs=()
fetch "$kernel_name" busybox-static grub-pc-bin grub-common libdevmapper1.02.1 grub-rescue-pc
key=$( (printf '%s\n' "${debs[@]##*/}"; cd "$here"; cat build.sh; find initramfs disk diskload.cpp -type f | sort | xargs cat) |
  sha256sum | cut -c 1-16)
out=$cache/$key
finish() {
  ln -sfn "$key" "$cache/current"
  echo "$out"
  exit
}
[[ -f $out/complete ]] && finish

work=$(mktemp -d "$cache/work.XXXXXX")
trap 'rm -rf "$work"' EXIT
for deb in "${debs[@]}"; do dpkg-deb -x "$deb" "$work/deb"; done
kernel_version=${kernel_name#linux-image-}
busybox=$work/deb/bin/busybox
rm -rf "$out"
mkdir -p "$out"
cp "$work/deb/boot/vmlinuz-$kernel_version" "$out/vmlinuz"
cp "$work/deb/usr/lib/grub-rescue/grub-rescue-cdrom.iso" "$out/rescue.img"  # bootable as a disk, too

# u32 FILE OFFSET: a little-endian number.
u32() { od -An -t u4 -j "$2" -N 4 "$1" | tr -d ' '; }

# Linux's boot protocol: payload_offset (0x248) counts from the protected-mode code, behind setup_sects (0x1f1) + 1 sectors.
make_vmlinux() {
  local setup_sectors payload size
  setup_sectors=$(od -An -t u1 -j $((0x1f1)) -N 1 "$out/vmlinuz" | tr -d ' ')
  payload=$(((setup_sectors + 1) * 512 + $(u32 "$out/vmlinuz" $((0x248)))))
  size=$(u32 "$out/vmlinuz" $((0x24c)))
  # The last four bytes of the payload are its unpacked length, not part of the LZ4 stream.
  head -c $((payload + size - 4)) "$out/vmlinuz" | tail -c +$((payload + 1)) | lz4 -dc > "$out/vmlinux" ||
    die "the kernel is not packed with lz4 any more"
}

copy_module() {  # copy_module NAME ROOT: the module and those that it depends on
  local file dependency
  file=$(cd "$work/deb" && find "lib/modules/$kernel_version/kernel" -name "$1.ko" -o -name "${1//_/-}.ko" | sed -n 1p)
  [[ -n $file ]] || die "module $1 is not in $kernel_name"
  [[ -f $2/$file ]] && return
  install -D -m 644 "$work/deb/$file" "$2/$file"
  # The "depends=" string of the module's .modinfo section.
  for dependency in $(tr '\0' '\n' < "$work/deb/$file" | sed -n 's/^depends=//p' | tr ',' ' '); do
    copy_module "$dependency" "$2"
  done
}

make_initrd() {
  local root=$work/initramfs module
  cp -r "$here/initramfs" "$root"
  mkdir -p "$root"/{bin,dev,proc,sys,mnt,lib/modules/"$kernel_version"}
  install -m 755 "$busybox" "$root/bin/busybox"
  ln -s busybox "$root/bin/sh"
  g++ -std=c++20 -O2 -static -s -o "$root/bin/diskload" "$here/diskload.cpp"
  chmod 755 "$root/init" "$root/etc/udhcpc"
  for module in "${modules[@]}"; do copy_module "$module" "$root"; done
  "$busybox" depmod -b "$root" "$kernel_version"
  # Not compressed: unpacking would cost a slow machine more than reading does.
  (cd "$root" && find . | sort | "$busybox" cpio -o -H newc -R 0:0 2> /dev/null) > "$out/initrd.img"
}

make_core() {  # GRUB's core image with all that reaching grub.cfg and starting Linux takes
  LD_LIBRARY_PATH=$work/deb/lib/x86_64-linux-gnu "$work/deb/usr/bin/grub-mkimage" -O i386-pc \
    -d "$work/deb/usr/lib/grub/i386-pc" -p '(hd0,msdos1)/boot/grub' -o "$work/core.img" \
    biosdisk part_msdos ext2 serial terminal normal echo linux configfile ls reboot halt
  (($(stat -c %s "$work/core.img") <= 2047 * 512)) || die "GRUB's core image does not fit before the first partition"
}

bytes() { printf "$(printf '\\x%02x' "$@")"; }
le32() { bytes $(($1 & 255)) $(($1 >> 8 & 255)) $(($1 >> 16 & 255)) $(($1 >> 24 & 255)); }

make_disk() {
  local root=$work/disk applet start=2048 sectors=$((63 * 2048)) image=$out/disk.img
  cp -r "$here/disk" "$root"
  mkdir -p "$root"/{bin,sbin,usr/bin,usr/sbin,dev,proc,sys,root,tmp,run,mnt}
  install -m 755 "$busybox" "$root/bin/busybox"
  for applet in $("$busybox" --list-full); do
    [[ -e $root/$applet ]] || ln -s /bin/busybox "$root/$applet"
  done
  ln -sf /bin/busybox "$root/sbin/init"
  install -m 755 "$here/initramfs/etc/udhcpc" "$root/etc/udhcpc"
  chmod 755 "$root/etc/rc"
  cp "$out/vmlinuz" "$out/initrd.img" "$root/boot/"
  make_core
  # boot.img (its first 440 bytes) loads core.img from sector 1 on, which is how both are made when nothing patches them.
  {
    head -c 440 "$work/deb/usr/lib/grub/i386-pc/boot.img"
    printf 'KVTZ\0\0'            # disk signature
    bytes 0x80 0xfe 0xff 0xff    # active; no CHS address
    bytes 0x83 0xfe 0xff 0xff    # Linux
    le32 $start
    le32 $sectors
    head -c 48 /dev/zero
    bytes 0x55 0xaa
    cat "$work/core.img"
  } > "$image"
  truncate -s $(((start + sectors) * 512)) "$image"
  # GRUB 2.06 reads neither of the two features that are off.
  mkfs.ext4 -q -F -L kvartz -O ^metadata_csum_seed,^orphan_file -E root_owner=0:0,offset=$((start * 512)) \
    -d "$root" "$image" $((sectors / 2))k 2> "$work/mkfs.log" || die "mkfs.ext4: $(cat "$work/mkfs.log")"
}

make_vmlinux
make_initrd
make_disk
touch "$out/complete"
finish
