"""Prints a line for a module's regression test: how many tests had which outcome, and a sum over their names and outcomes; and
which failed. Arguments: the module, the XML that the test left."""

import collections
import hashlib
import sys
import xml.etree.ElementTree

cases = []
for case in xml.etree.ElementTree.parse(sys.argv[2]).getroot().iter("testcase"):
    outcome = next((child.tag for child in case if child.tag in ("failure", "error", "skipped")), case.get("result"))
    cases.append(f"{case.get('name')} {outcome}")
counts = collections.Counter(case.rsplit(" ", 1)[1] for case in cases)
digest = hashlib.sha256("\n".join(sorted(cases)).encode()).hexdigest()[:16]
print(sys.argv[1], *(f"{count} {outcome}" for outcome, count in sorted(counts.items())), digest)
for case in sorted(case for case in cases if case.endswith((" failure", " error"))):
    print("  ", case)
