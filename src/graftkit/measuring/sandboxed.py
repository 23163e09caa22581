"""What runs inside the sandbox: shuts itself in, then runs the program that it reads. Never imported; see `sandbox`.

Standard library only: it starts as `python -I sandboxed.py FD SECONDS MEMORY FILE_BYTES`, and reads a nonce, a line
break and a program from standard input. It writes `NONCE isolated`/`NONCE limited` once it is shut in, and then
`NONCE passed` or `failed REASON`, to the file descriptor FD.
"""

import ctypes
import os
import resource
import struct
import sys

NEW_MOUNTS, NEW_IPC, NEW_USER, NEW_PROCESSES, NEW_NETWORK = 0x20000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
PRIVATE, RECURSIVE, NO_SUID, NO_DEVICES = 0x40000, 0x4000, 0x2, 0x4
MOUNT_SETATTR, AT_CWD, AT_RECURSIVE, READ_ONLY = 442, -100, 0x8000, 0x1
PARENT_DEATH, KILL = 1, 9
NO_NEW_PRIVILEGES, SET_FILTER, FILTER = 38, 22, 2
CLONE3, THREAD, NONE = 435, 0x10000, 0xFFFFFFFF
CALLS = {"x86_64": (0xC000003E, 56, 57, 58), "aarch64": (0xC00000B7, 220, NONE, NONE)}
"""Of a machine: its number in filters, and its system calls clone, fork and vfork."""
LOAD, EQUAL, AND, RETURN = 0x20, 0x15, 0x54, 0x06
ALLOW, NOT_PERMITTED, NOT_KNOWN = 0x7FFF0000, 0x50001, 0x50026


class _Attributes(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("set", "clear", "propagation", "user_namespace")]


def _enter_namespaces(scratch: str, room: int) -> bool:
    """Own users, mounts, processes and network: none of the machine's network, one small directory to write in.

    False where the kernel or a container does not allow it; then nothing has changed but, at most, the namespace.
    """
    user, group = os.getuid(), os.getgid()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(NEW_USER | NEW_MOUNTS | NEW_PROCESSES | NEW_NETWORK | NEW_IPC) != 0:
        return False
    for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
        with open(f"/proc/self/{name}", "w") as handle:
            handle.write(text)
    attributes = _Attributes(READ_ONLY | NO_SUID, 0, 0, 0)
    made = (
        libc.mount(b"none", b"/", None, ctypes.c_ulong(PRIVATE | RECURSIVE), None),
        libc.syscall(MOUNT_SETATTR, AT_CWD, b"/", AT_RECURSIVE, ctypes.byref(attributes), ctypes.sizeof(attributes)),
        libc.mount(b"none", scratch.encode(), b"tmpfs", ctypes.c_ulong(NO_SUID | NO_DEVICES), f"size={room}".encode()),
    )
    os.chdir(scratch)
    return not any(made)


def _limit(seconds: int, memory: int, file_bytes: int) -> None:
    limits = (
        (resource.RLIMIT_CPU, seconds), (resource.RLIMIT_AS, memory), (resource.RLIMIT_FSIZE, file_bytes),
        (resource.RLIMIT_NOFILE, 64), (resource.RLIMIT_CORE, 0), (resource.RLIMIT_STACK, 64 << 20),
        (resource.RLIMIT_NPROC, 64),
    )  # fmt: skip
    for kind, most in limits:
        hard = resource.getrlimit(kind)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (most, most))


def _forbid_processes() -> None:
    """Lets threads start, but no processes, so that a program's memory is that of all it starts: a limit on their
    number does not hold for root. Nothing is done on machines whose system calls are not known here."""
    if os.uname().machine not in CALLS:
        return
    machine, clone, fork, vfork = CALLS[os.uname().machine]
    rules = (  # what to do, lines to leave out where it is so and where not, a value
        (LOAD, 0, 0, 4), (EQUAL, 0, 8, machine), (LOAD, 0, 0, 0), (EQUAL, 8, 0, CLONE3), (EQUAL, 6, 0, fork),
        (EQUAL, 5, 0, vfork), (EQUAL, 0, 3, clone), (LOAD, 0, 0, 16), (AND, 0, 0, THREAD), (EQUAL, 1, 0, 0),
        (RETURN, 0, 0, ALLOW), (RETURN, 0, 0, NOT_PERMITTED), (RETURN, 0, 0, NOT_KNOWN),
    )  # fmt: skip
    held = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *rule) for rule in rules))
    told = ctypes.create_string_buffer(struct.pack("HP", len(rules), ctypes.addressof(held)))
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    libc.prctl(SET_FILTER, FILTER, told, 0, 0)


def _run(program: str) -> str:
    """Empty where the program came to its end, else why it did not."""
    try:
        exec(compile(program, "program", "exec"), {"__name__": "program"})
    except BaseException as error:  # SystemExit too: a program that leaves early has not passed
        return f"{type(error).__name__}: {error}"[:200]
    return ""


def main() -> None:
    """Runs one program, and says how it went."""
    report, seconds, memory, file_bytes = map(int, sys.argv[1:])
    nonce, _, program = sys.stdin.read().partition("\n")
    isolated = _enter_namespaces(os.getcwd(), file_bytes)
    inner = os.fork() if isolated else 0  # the first process of the new namespace; with it all others end
    if inner:
        os.waitpid(inner, 0)
        return
    ctypes.CDLL(None).prctl(PARENT_DEATH, KILL)
    _limit(seconds, memory, file_bytes)
    _forbid_processes()
    os.write(report, f"{nonce} {'isolated' if isolated else 'limited'}\n".encode())
    failure = _run(program)
    os.write(report, (f"failed {failure}" if failure else f"{nonce} passed").encode(errors="replace"))
    os._exit(0)


if __name__ == "__main__":
    main()
