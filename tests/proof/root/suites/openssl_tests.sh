# The test programs of OpenSSL's own source package: each test's outcome.
cd /usr/lib/openssl-tests || exit 1
export OPENSSL_TEST_RAND_ORDER=0
failed=0
one() {  # one NAME PROGRAM [ARGUMENT...]
  name=$1
  shift
  "$@" > /tmp/tap 2>> /tmp/details
  status=$?
  [ $status = 0 ] || { failed=1; tail -n 5 /tmp/tap >&2; }
  echo "$name: status $status, $(grep -c '^ *ok' /tmp/tap) ok, $(grep -c '^ *not ok' /tmp/tap) not ok"
}
for file in 30-test_evp_data/*.txt; do
  one "evp_test $(basename "$file")" ./evp_test -config default-and-legacy.cnf "$file"
done
for program in *test; do
  case $program in evp_test | evp_extra_test) continue ;; bntest) one bntest ./bntest 10-test_bn_data/*.txt ;;
    *) one "$program" "./$program" ;;
  esac
done
exit $failed
