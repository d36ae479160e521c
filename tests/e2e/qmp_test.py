"""The management protocol of a running machine: QMP over a socket, and the keys of the multiplexed console."""

from harness import Failure, Qmp, expect_equal, test


def start_with_qmp(context, *arguments):
    path = context.path("qmp")
    vm = context.start("-m", "256", "-nic", "none", "-qmp", f"unix:{path},server=on,wait=off", *arguments)
    return vm, Qmp(vm, path)


def expect_error(answer, error_class, what):
    if answer.get("error", {}).get("class") != error_class or not answer["error"].get("desc"):
        raise Failure(f"QMP: {what}: {answer}, not an error of class {error_class}")


@test(seconds=60)
def qmp_negotiates_and_answers(context):
    vm, qmp = start_with_qmp(context, "-S", "-name", "guest-7", *context.kernel(""))
    version = qmp.greeting["QMP"]["version"]["qemu"]
    expect_equal(sorted(version), ["major", "micro", "minor"], "fields of the greeting's version")
    expect_equal(isinstance(qmp.greeting["QMP"]["capabilities"], list), True, "capabilities is a list")
    expect_error(qmp.send_text('{"execute": "query-status"}'), "CommandNotFound", "a command before qmp_capabilities")
    expect_equal(qmp.call("qmp_capabilities"), {}, "qmp_capabilities")
    expect_error(qmp.send_text('{"execute": "qmp_capabilities"}'), "CommandNotFound", "qmp_capabilities again")
    status = qmp.call("query-status")
    expect_equal((status["running"], status["status"]), (False, "prelaunch"), "query-status with -S")
    expect_equal(qmp.call("query-version")["qemu"], version, "query-version")
    commands = {row["name"] for row in qmp.call("query-commands")}
    missing = {"stop", "cont", "quit", "system_reset", "system_powerdown", "query-cpus-fast"} - commands
    expect_equal(missing, set(), "commands that query-commands lacks")
    cpus = qmp.call("query-cpus-fast")
    expect_equal([cpu["cpu-index"] for cpu in cpus], [0], "indexes of query-cpus-fast")
    expect_equal(cpus[0]["thread-id"] > 0, True, "a thread id")
    expect_error(qmp.send_text('{"execute": "no-such-command"}'), "CommandNotFound", "an unknown command")
    expect_error(qmp.send_text('{"execute": "stop", "arguments": {"x": 1}}'), "GenericError", "an unknown argument")
    expect_error(qmp.send_text('{"execute": 7}'), "GenericError", "a command that is a number")
    expect_error(qmp.send_text('{"execute": "stop" "x"}'), "GenericError", "broken JSON")
    expect_equal(qmp.send_text('{"execute": "query-version", "id": [1, "a"]}')["id"], [1, "a"], "the id of an answer")
    expect_equal(qmp.call("quit"), {}, "quit")
    expect_equal(qmp.event("SHUTDOWN"), {"guest": False, "reason": "host-qmp-quit"}, "SHUTDOWN's data")
    vm.expect_exit(0)


@test()
def qmp_stops_continues_and_resets(context):
    vm, qmp = start_with_qmp(context, *context.run("echo ready; while :; do read line; echo got $line; done"))
    qmp.call("qmp_capabilities")
    vm.expect(r"^ready")
    qmp.call("stop")
    qmp.event("STOP")
    expect_equal(qmp.call("query-status"), qmp.call("query-status") | {"running": False, "status": "paused"}, "status")
    vm.send("hello\n")
    qmp.call("cont")
    qmp.event("RESUME")
    vm.expect(r"^got hello")
    qmp.call("system_reset")
    # -no-reboot makes a reset the end.
    expect_equal(qmp.event("SHUTDOWN")["reason"], "host-qmp-system-reset", "why the machine ended")
    vm.expect_exit(0)


@test()
def guest_reboots_and_comes_back(context):
    path = context.path("qmp")
    vm = context.start_bare("-M", "pc", "-accel", "tcg", "-display", "none", "-serial", "stdio", "-m", "256", "-nic",
                            "none", "-qmp", f"unix:{path},server=on,wait=off",
                            *context.run("echo again; read line; true", words="kvartz.reboot"))
    qmp = Qmp(vm, path)
    qmp.call("qmp_capabilities")
    vm.expect(r"^again")
    vm.send("\n")
    expect_equal(qmp.event("RESET"), {"guest": True, "reason": "guest-reset"}, "RESET's data")
    vm.expect(r"^again")
    qmp.call("system_reset")
    # Firmware may have reset the machine a second time before, to start from a clean state.
    while (reset := qmp.event("RESET"))["guest"]:
        expect_equal(reset["reason"], "guest-reset", "a reset's reason")
    expect_equal(reset["reason"], "host-qmp-system-reset", "the reset's reason")
    vm.expect(r"^again")
    qmp.call("quit")
    vm.expect_exit(0)


@test()
def power_button_reaches_the_guest(context):
    # The button of ACPI is an input device in Linux; its event is 24 bytes (two 64-bit times, type, code, value).
    wait = ("modprobe -a button evdev; e=$(grep -l Power /sys/class/input/event*/device/name); e=${e%/device*}; "
            "exec 3< /dev/input/${e##*/}; echo waiting; head -c 24 <&3 | wc -c")
    vm, qmp = start_with_qmp(context, *context.run(wait))
    qmp.call("qmp_capabilities")
    vm.expect(r"^waiting")
    qmp.call("system_powerdown")
    qmp.event("POWERDOWN")
    vm.expect(r"^24\n")
    expect_equal(qmp.event("SHUTDOWN"), {"guest": True, "reason": "guest-shutdown"}, "SHUTDOWN's data")
    vm.expect_exit(0)


@test(seconds=60)
def console_keys_switch_and_leave(context):
    vm = context.start("-nographic", "-m", "256", "-nic", "none", "-S", *context.kernel(""))
    vm.send("\x01h")
    vm.expect(r"C-a x", seconds=30)
    vm.send("\x01c")
    vm.expect(r"^\((qemu|kvartz)\) ", seconds=30)
    vm.send("info status\n")
    vm.expect(r"VM status: paused", seconds=30)
    vm.send("\x01x")
    vm.expect_exit(0, seconds=30)
