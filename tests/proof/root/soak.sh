# Load without an end, for soak.py: processes that fork and map memory, code that writes code, a disk and a network. Prints
#   @clock SECONDS.NANOSECONDS      ten times a second
#   @load NAME rounds seconds       when a round of a load has ended
#   @fault NAME text                when one computed something else than the time before
# PROOF_NET: a URL that the host serves.
mkdir -p /tmp/disk
mkfs.ext4 -q -F /dev/vdb 2> /dev/null && mount /dev/vdb /tmp/disk || echo "@fault disk cannot make a file system"

ifconfig lo 127.0.0.1 up
# What the user-mode network gives a guest.
ifconfig eth0 10.0.2.15 netmask 255.255.255.0 up && route add default gw 10.0.2.2

load() {  # load NAME COMMAND...: again and again; what it prints must stay the same
  name=$1
  shift
  round=0 first=
  while :; do
    before=$(date +%s)
    answer=$("$@" 2>&1 | tail -n 5 | tr '\n' ' ')
    [ -n "$first" ] || first=$answer
    [ "$answer" = "$first" ] || echo "@fault $name $answer (before: $first)"
    round=$((round + 1))
    echo "@load $name $round $(($(date +%s) - before))"
  done
}

forks() { i=0; while [ $i -lt 200 ]; do /bin/true; (: &) ; x=$(echo $i); i=$((i + 1)); done; wait; echo "$x"; }
disk() {
  dd if=/dev/zero bs=64k count=512 2> /dev/null | openssl enc -aes-128-ctr -K 00 -iv 00 2> /dev/null > /tmp/disk/random
  cp /tmp/disk/random /tmp/disk/copy && sync && echo 3 > /proc/sys/vm/drop_caches
  sha256sum < /tmp/disk/copy
  rm /tmp/disk/copy
}
network() { python3 /proof/fetch.py "$PROOF_NET"; }

load forks forks &
load maps python3 /proof/maps.py &
load node node /proof/program.js 0.1 &
load luajit luajit /proof/program.lua &
load disk disk &
load network network &
exec python3 /proof/clock.py
