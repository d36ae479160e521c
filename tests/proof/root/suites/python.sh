# Python's own regression tests of numbers, strings and what is built on them, or those named in PROOF_PYTHON (with commas):
# each test's outcome.
cd /tmp || exit 1
failed=0
for module in $(echo "${PROOF_PYTHON:-$(cat /proof/python_tests)}" | tr ',' ' '); do
  rm -f results.xml
  python3 -m test --junit-xml /tmp/results.xml "$module" > module 2>&1 || { failed=1; tail -n 40 module >&2; }
  python3 /proof/python_results.py "$module" results.xml
done
exit $failed
