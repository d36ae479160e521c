# Python's own regression tests of numbers, strings and what is built on them: each test's outcome.
cd /tmp || exit 1
# shellcheck disable=SC2086
timeout 1500 python3 -m test --junit-xml /tmp/results.xml $(cat /proof/python_tests) >&2
exec python3 /proof/python_results.py /tmp/results.xml
