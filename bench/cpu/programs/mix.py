class Point:
    def __init__(self, x):
        self.x = x

    def step(self, y):
        return Point((self.x * 7 + y) % 10007)


counts = {}
point = Point(1)
for i in range(60000):
    point = point.step(i)
    key = "k%d" % (point.x % 500)
    counts[key] = counts.get(key, 0) + 1
ordered = sorted(((count, key) for key, count in counts.items()), reverse=True)
text = "".join(key for _, key in ordered) * 20
print(len(text.split("k")), sum(count * count for count, _ in ordered), sum(x / 3 for x in range(100000)))
