# SQLite's speed test with verification, on a file and in memory; what it prints but for the times.
cd /tmp || exit 1
set -e
plain() { sed -E 's/\.* +[0-9.]+s$//'; }
for set in main cte fp orm; do
  speedtest1 --verify --size 12 --testset $set "/tmp/$set.db" > speed
  plain < speed
done
speedtest1 --verify --size 12 --memdb > speed
plain < speed
sqlite3 /tmp/main.db 'pragma integrity_check; select count(*), sum(length(name)) from sqlite_master;'
