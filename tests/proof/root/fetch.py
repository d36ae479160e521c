"""Fetches a file over the network; prints its length and digest."""

import hashlib
import sys
import urllib.request

data = urllib.request.urlopen(sys.argv[1], timeout=120).read()
print(len(data), hashlib.sha256(data).hexdigest()[:16])
