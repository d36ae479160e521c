# Runs the script that PROOF names, in the guest and natively alike.
export PATH=/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C.UTF-8 PYTHONHASHSEED=0 TERM=dumb
mount -t tmpfs -o size=1g tmp /tmp
cd /tmp || exit 1
sh "/proof/$PROOF" 2>&1
