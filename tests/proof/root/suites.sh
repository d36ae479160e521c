# Runs the suites named in PROOF_SUITES (with commas); what they print is framed for guest_suites.py:
#   @go NAME   @out NAME text...   @err NAME text...   @end NAME status seconds   @done
IFS=,
for name in $PROOF_SUITES; do
  unset IFS
  echo "@go $name"
  before=$(date +%s.%N)
  sh "/proof/suites/$name.sh" > /tmp/out 2> /tmp/err
  status=$?
  after=$(date +%s.%N)
  sed "s/^/@out $name /" /tmp/out
  tail -n 12 /tmp/err | sed "s/^/@err $name /"
  echo "@end $name $status $(echo "$before $after" | awk '{print $2 - $1}')"
  rm -rf /tmp/*
done
echo @done
