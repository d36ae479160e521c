#!/usr/bin/env bash
# Makes what ./dev guest-suites and ./dev soak run, in build/proof. What is there is not made again; remove it to renew it.
#   rootfs     Debian bookworm with g++, Python and its tests, OpenSSL and its tests, SQLite, node, LuaJIT; and, in /proof,
#              the scripts of tests/proof/root, with some of the sources of Kvartz to be compiled
#   root.img   the same as an ext4 file system
#   kernel, initrd.img   of the test guests (tests/guest/build.sh)
# Needs root (debootstrap, chroot), a network the first time, and a quarter of an hour.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$here/../..
guest=$("$root/tests/guest/build.sh")
mkdir -p "$root/build/proof"
cd "$root/build/proof"
export PATH=$PATH:/usr/sbin:/sbin

die() { echo "tests/proof/build.sh: $*" >&2; exit 1; }

[[ $(id -u) == 0 ]] || die "root is needed (debootstrap, chroot)"
exec 9> lock
flock 9

packages=g++,libfmt-dev,make,perl,python3,libpython3.11-testsuite,openssl,sqlite3,libsqlite3-dev,nodejs,luajit
openssl_tests=(evp_test evp_extra_test bntest ectest exptest rsa_test sha_test destest bftest casttest ideatest rc2test
  rc4test igetest hmactest cmactest ecdsatest dsatest dhtest gmdifftest cipherbytes_test asn1_encode_test
  modes_internal_test poly1305_internal_test chacha_internal_test curve448_internal_test sm4_internal_test)

in_root() { chroot rootfs env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C.UTF-8 "$@"; }

once() {  # once NAME: runs it unless it is done
  [[ -f rootfs/.made/$1 ]] || { "$1" && mkdir -p rootfs/.made && touch "rootfs/.made/$1"; }
}

debian() {
  local mirror
  mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 'Codename: bookworm' | sed -n 1p)
  rm -rf rootfs
  debootstrap --variant=minbase --include="$packages" bookworm rootfs ${mirror:+"$mirror"} > debootstrap.log ||
    die "debootstrap failed; see build/proof/debootstrap.log"
}

sources() {
  cp /etc/resolv.conf rootfs/etc/
  sed 's/^deb /deb-src /' rootfs/etc/apt/sources.list > rootfs/etc/apt/sources.list.d/source.list
  in_root sh -c 'cd /usr/src && apt-get -q update && apt-get -q --download-only source openssl sqlite3' > sources.log 2>&1 ||
    die "cannot download the sources of openssl and sqlite3; see build/proof/sources.log"
}

speedtest() {
  in_root sh -c 'cd /usr/src && rm -rf sqlite3-*/ && python3 -m tarfile -e sqlite3_*.orig.tar.xz &&
    gcc -O2 -o /usr/local/bin/speedtest1 sqlite3-*/test/speedtest1.c -lsqlite3 && rm -r sqlite3-*/' || die "speedtest1"
}

openssl_selftests() {  # the library itself is part of each program
  in_root sh -c 'cd /usr/src && rm -rf openssl-*/ && tar xf openssl_*.orig.tar.gz && cd openssl-*/ &&
    ./Configure linux-x86_64 no-shared no-module && make build_generated && make -j"$(nproc)" "$@" &&
    strip "$@" && mkdir -p /usr/lib/openssl-tests && cp "$@" /usr/lib/openssl-tests/ &&
    cp -r test/recipes/30-test_evp_data test/recipes/10-test_bn_data test/default-and-legacy.cnf /usr/lib/openssl-tests/ && cd .. && rm -r openssl-*/' sh \
    "${openssl_tests[@]/#/test/}" > openssl.log 2>&1 || die "OpenSSL's tests; see build/proof/openssl.log"
}

tidy() { rm -rf rootfs/var/cache/apt/* rootfs/var/lib/apt/lists/* rootfs/usr/share/{doc,locale,man}/* rootfs/usr/src/*; }

proof() {
  rm -rf rootfs/proof
  cp -r "$here/root" rootfs/proof
  cp -r "$root/src" rootfs/proof/src
  ln -sf /proof/init rootfs/sbin/init
  [[ -f rootfs/rsa.pem ]] || in_root openssl genrsa -out /rsa.pem 2048 2> /dev/null
  rm -f root.img root.img.new
  truncate -s 2G root.img.new
  mkfs.ext4 -q -F -O ^has_journal -d rootfs root.img.new
  mv root.img.new root.img
  stamp > stamp
}

stamp() { (cd "$root" && find tests/proof/root src -type f | sort | xargs sha256sum; sha256sum "$here/build.sh") | sha256sum; }

for step in debian sources speedtest openssl_selftests tidy; do once $step; done
[[ -f root.img && $(stamp) == "$(cat stamp 2> /dev/null)" ]] || proof
ln -sfn "$guest/vmlinuz" kernel
ln -sfn "$guest/initrd.img" initrd.img
