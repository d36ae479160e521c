"""Prints a line for each module of a regression test's XML: how many tests had which outcome, and a sum over their names and
outcomes."""

import collections
import hashlib
import sys
import xml.etree.ElementTree

modules = collections.defaultdict(list)
for case in xml.etree.ElementTree.parse(sys.argv[1]).getroot().iter("testcase"):
    name = case.get("name")
    outcome = next((child.tag for child in case if child.tag in ("failure", "error", "skipped")), case.get("result"))
    modules[".".join(name.split(".")[:2]) if name.startswith("test.") else name.split(".")[0]].append(f"{name} {outcome}")
total = collections.Counter()
for module, cases in sorted(modules.items()):
    counts = collections.Counter(case.rsplit(" ", 1)[1] for case in cases)
    total += counts
    digest = hashlib.sha256("\n".join(sorted(cases)).encode()).hexdigest()[:16]
    print(module, *(f"{count} {outcome}" for outcome, count in sorted(counts.items())), digest)
    for case in sorted(case for case in cases if case.endswith((" failure", " error"))):
        print("  ", case)
print("all:", *(f"{count} {outcome}" for outcome, count in sorted(total.items())))
