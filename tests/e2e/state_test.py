"""The state of a running Linux, saved to a file and loaded into a fresh process, with its disk and network card."""

import re

from harness import Failure, Qmp, expect_equal, test

COUNT = ("i=0; while [ $i -lt 30 ]; do echo tick $i; i=$((i+1)); sleep 1; "
         "dd if=/dev/vda of=/dev/null bs=64k count=1 2>/dev/null || echo no disk; done")


@test()
def saved_linux_goes_on_in_a_fresh_process(context):
    arguments = ["-m", "128", "-nic", "user", "-drive", f"file={context.disk()},format=raw,if=virtio", *context.run(COUNT)]
    first = context.start(*arguments, "-qmp", f"unix:{context.path('qmp')},server=on,wait=off")
    qmp = Qmp(first, context.path("qmp"))
    qmp.call("qmp_capabilities")
    first.expect(r"^tick 3\n")
    answer = qmp.send_text('{"execute": "x-kvartz-save-state", "arguments": {"filename": "%s"}}' % context.path("state"))
    expect_equal(answer.get("return"), {}, "the answer to x-kvartz-save-state")
    qmp.call("quit")
    first.expect_exit(0)
    second = context.start(*arguments, "-incoming", f"file:{context.path('state')}")
    second.expect(r"^tick 29\n")
    second.expect(r"reboot: Power down")
    second.expect_exit(0)
    ticks = [int(tick) for tick in re.findall(r"^tick (\d+)$", first.output + second.output, re.MULTILINE)]
    expect_equal(ticks, list(range(30)), "what both printed")
    if "no disk" in second.output:
        raise Failure(f"the disk is gone after the move; {second.tail()}")
