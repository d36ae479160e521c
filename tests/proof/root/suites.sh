# Runs the suites named in PROOF_SUITES (with commas); what they print is framed for guest_suites.py:
#   @go NAME   @out NAME text...   @err NAME text...   @end NAME status seconds   @done
IFS=,
for name in $PROOF_SUITES; do
  unset IFS
  echo "@go $name"
  before=$(date +%s.%N)
  { sh "/proof/suites/$name.sh" 2> /tmp/err; echo $? > /tmp/status; } | sed -u "s/^/@out $name /"
  read -r status < /tmp/status
  after=$(date +%s.%N)
  tail -n 60 /tmp/err | sed "s/^/@err $name /"
  echo "@end $name $status $(echo "$before $after" | awk '{print $2 - $1}')"
  rm -rf /tmp/*
done
echo @done
