// The guest-speed benchmark: one static program that is the first process of a guest (it then
// powers the machine off), or a process of the host (--native). It times workloads, or the commands
// of a list in another root file system, and prints
//
//   BENCHINFO key value...
//   BENCHGO   name                                          the timed part starts
//   BENCH     name value unit seconds cpu-seconds units first-unit-seconds checksum
//   BENCHSKIP name reason          BENCHFAIL name reason
//   BENCHDONE
//
// A guest takes its settings from the kernel's command line, which Linux makes its first process's
// environment:
//   BENCH_SECS=S  BENCH_ONLY=name,name...  BENCH_PROGRAMS=/dev/vda (mount it and time the commands
//   of its /bench/list)
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/klog.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/utsname.h>
#include <sys/wait.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

#include "bench.h"

const char *disk_path = "/dev/vda";
int is_native;
static int cpus = 1;          // natively: on how many of the host's CPUs
static double seconds = 1.0;  // each workload at least
static const char *only;      // names with commas, or NULL: all

static const struct workload *const groups[] = {
    integer_workloads, memory_workloads, vector_workloads, kernel_workloads,
    library_workloads, code_workloads,   disk_workloads,   thread_workloads};

double now(void) {
  struct timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return time.tv_sec + time.tv_nsec * 1e-9;
}

static double cpu_seconds_of(int who) {
  struct rusage usage;
  getrusage(who, &usage);
  return usage.ru_utime.tv_sec + usage.ru_stime.tv_sec +
         1e-6 * (usage.ru_utime.tv_usec + usage.ru_stime.tv_usec);
}
static double cpu_seconds(void) {
  return cpu_seconds_of(RUSAGE_SELF) + cpu_seconds_of(RUSAGE_CHILDREN);
}

static uint32_t random_state = 12345;
void seed(uint32_t value) { random_state = value; }
uint32_t random_u32(void) { return random_state = random_state * 1664525u + 1013904223u; }

uint64_t fnv1a(const void *data, size_t size) {
  uint64_t hash = 0xcbf29ce484222325ull;
  for (const uint8_t *byte = data; size; size--) hash = (hash ^ *byte++) * 0x100000001b3ull;
  return hash;
}

void *map_small_pages(size_t size) {
  void *pages = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (pages == MAP_FAILED) return NULL;
  madvise(pages, size, MADV_NOHUGEPAGE);
  return pages;
}

static void say(const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  vdprintf(1, format, arguments);
  va_end(arguments);
  if (!is_native) tcdrain(1);  // the reader's clock is compared with ours
}

static int is_wanted(const char *name) {
  size_t length = strlen(name);
  if (!only) return 1;
  for (const char *at = only; *at; at += strcspn(at, ","), at += *at == ',')
    if (strcspn(at, ",") == length && !memcmp(at, name, length)) return 1;
  return 0;
}

static void pin_to_one_cpu(void) {
  cpu_set_t one;
  CPU_ZERO(&one);
  CPU_SET(sysconf(_SC_NPROCESSORS_ONLN) - 1, &one);
  sched_setaffinity(0, sizeof one, &one);
}

static void report(const char *name, double value, const char *unit, double elapsed, double cpu,
                   unsigned long units, double first, uint64_t checksum) {
  say("BENCH %s %.6g %s %.6f %.6f %lu %.6f %016lx\n", name, value, unit, elapsed, cpu, units, first,
      (unsigned long)checksum);
}

static void run_workload(const struct workload *w) {
  int result = w->setup ? w->setup() : SETUP_OK;
  if (result == SETUP_UNAVAILABLE) {
    say("BENCHSKIP %s not-available\n", w->name);
    return;
  }
  if (result != SETUP_OK) {
    say("BENCHFAIL %s setup-errno-%d\n", w->name, errno);
    return;
  }
  double start = now();
  uint64_t checksum = w->run();
  double first = now() - start;
  unsigned long units = 0, wrong = 0;
  say("BENCHGO %s\n", w->name);
  double cpu = cpu_seconds(), elapsed;
  start = now();
  do {
    uint64_t again = w->run();
    wrong += again == 0 || (!w->varies && again != checksum);
    units++;
    elapsed = now() - start;
  } while (elapsed < seconds);
  if (w->finish) w->finish();
  cpu = cpu_seconds() - cpu;
  report(w->name, w->measured ? w->measured() : units * w->work / elapsed, w->unit, elapsed, cpu,
         units, first, w->varies ? 1 : checksum);
  if (wrong) say("BENCHFAIL %s %lu-of-%lu-wrong\n", w->name, wrong, units);
}

static void run_workloads(void) {
  for (size_t g = 0; g < sizeof groups / sizeof groups[0]; g++)
    for (const struct workload *w = groups[g]; w->name; w++) {
      if (!is_wanted(w->name)) continue;
      pid_t child = fork();
      if (!child) {
        setpgid(0, 0);
        if (is_native && cpus == 1) pin_to_one_cpu();
        alarm(60 + (int)(seconds * 10));
        run_workload(w);
        _exit(0);
      }
      int status = 0;
      waitpid(child, &status, 0);
      kill(-child, SIGKILL);
      if (WIFSIGNALED(status)) say("BENCHFAIL %s signal-%d\n", w->name, WTERMSIG(status));
      while (waitpid(-1, NULL, WNOHANG) > 0) continue;
    }
}

static pid_t start_command(const char *command, int output) {
  pid_t child = fork();
  if (child) return child;
  int null = open("/dev/null", O_RDWR);
  dup2(null, 0);
  dup2(output, 1);
  dup2(null, 2);
  if (is_native) pin_to_one_cpu();
  setenv("PATH", "/usr/bin:/bin:/usr/sbin:/sbin", 1);
  setenv("HOME", "/root", 1);
  setenv("LC_ALL", "C", 1);
  execl("/bin/sh", "sh", "-c", command, (char *)NULL);
  _exit(127);
}

// Returns how the command ended, in wait's form, and the hash of what it printed.
static int run_command(const char *command, uint64_t *checksum) {
  static char printed[1 << 16];
  int pipe_ends[2], status;
  ssize_t got;
  size_t size = 0;
  if (pipe2(pipe_ends, O_CLOEXEC)) return -1;
  pid_t child = start_command(command, pipe_ends[1]);
  close(pipe_ends[1]);
  while (size < sizeof printed &&
         (got = read(pipe_ends[0], printed + size, sizeof printed - size)) > 0)
    size += got;
  close(pipe_ends[0]);
  waitpid(child, &status, 0);
  *checksum = fnv1a(printed, size);
  return status;
}

// Times each command of a list (lines "name<TAB>shell command") in the root file system at `root`.
// The first of its two runs warms the caches.
static int run_programs(const char *root) {
  if (chroot(root) || chdir("/tmp")) return 1;
  FILE *list = fopen("/bench/list", "r");
  if (!list) return 1;
  char *line = NULL;
  size_t capacity = 0;
  while (getline(&line, &capacity, list) > 0) {
    line[strcspn(line, "\n")] = 0;
    char *command = strchr(line, '\t');
    if (!command) continue;
    *command++ = 0;
    if (!is_wanted(line)) continue;
    uint64_t checksum;
    double start = now();
    int status = run_command(command, &checksum);
    double first = now() - start;
    say("BENCHGO %s\n", line);
    double cpu = cpu_seconds();
    start = now();
    status |= run_command(command, &checksum);
    double elapsed = now() - start;
    report(line, elapsed, "s", elapsed, cpu_seconds() - cpu, 1, first, checksum);
    if (status) say("BENCHFAIL %s status-0x%x\n", line, status);
  }
  return 0;
}

static void say_info(void) {
  struct utsname name;
  uname(&name);
  say("BENCHINFO kernel %s\n", name.release);
  char clock[100] = "";
  FILE *file = fopen("/sys/devices/system/clocksource/clocksource0/current_clocksource", "r");
  if (file && fgets(clock, sizeof clock, file)) say("BENCHINFO clocksource %s", clock);
  if (file) fclose(file);
  say("BENCHINFO cpus %ld\n", sysconf(_SC_NPROCESSORS_ONLN));
}

static void mount_all(void) {
  static const struct {
    const char *type, *where;
  } mounts[] = {{"devtmpfs", "/dev"},
                {"proc", "/proc"},
                {"sysfs", "/sys"},
                {"tmpfs", "/dev/shm"},
                {"tmpfs", "/tmp"}};
  for (size_t i = 0; i < sizeof mounts / sizeof mounts[0]; i++) {
    mkdir(mounts[i].where, 0755);
    mount(mounts[i].type, mounts[i].where, mounts[i].type, 0, NULL);
  }
}

static void load_drivers(void) {
  pid_t child = fork();
  if (!child) {
    execl("/bin/busybox", "modprobe", "-a", "virtio_pci", "virtio_blk", (char *)NULL);
    _exit(127);
  }
  waitpid(child, NULL, 0);
  for (int i = 0; i < 100 && access(disk_path, R_OK); i++) usleep(10000);
}

static void run_programs_of_disk(const char *disk) {
  if (mount(disk, "/mnt", "ext4", MS_RDONLY | MS_NOATIME, NULL)) {
    say("BENCHFAIL programs mount-errno-%d\n", errno);
    return;
  }
  mount("/dev", "/mnt/dev", NULL, MS_BIND, NULL);
  mount("proc", "/mnt/proc", "proc", 0, NULL);
  mount("tmpfs", "/mnt/tmp", "tmpfs", 0, NULL);
  if (run_programs("/mnt")) say("BENCHFAIL programs no-list\n");
}

static void be_init(void) {
  mkdir("/dev", 0755);
  mount("devtmpfs", "/dev", "devtmpfs", 0, NULL);
  int console = open("/dev/console", O_RDWR);
  for (int fd = 0; fd < 3; fd++) dup2(console, fd);
  say("BENCHINFO init\n");
  klogctl(8, NULL, 1);  // SYSLOG_ACTION_CONSOLE_LEVEL: no messages between our lines
  mount_all();
  load_drivers();
  const char *value;
  if ((value = getenv("BENCH_SECS"))) seconds = atof(value);
  only = getenv("BENCH_ONLY");
  say_info();
  if ((value = getenv("BENCH_PROGRAMS"))) {
    run_programs_of_disk(value);
  } else {
    run_workloads();
  }
  say("BENCHDONE\n");
  sync();
  reboot(RB_POWER_OFF);
}

static int usage(void) {
  fprintf(stderr,
          "usage: bench --list | --native [--cpus 1|2] [--secs S] [--only NAME,...] [--disk FILE] "
          "[--programs ROOT]\n");
  return 2;
}

int main(int argc, char **argv) {
  const char *root = NULL;
  if (argc && !strcmp(argv[0], EXIT_AT_ONCE)) _exit(EXIT_AT_ONCE_CODE);
  if (getpid() == 1) be_init();
  if (argc == 2 && !strcmp(argv[1], "--list")) {
    for (size_t g = 0; g < sizeof groups / sizeof groups[0]; g++)
      for (const struct workload *w = groups[g]; w->name; w++) puts(w->name);
    return 0;
  }
  if (argc < 2 || argc % 2 || strcmp(argv[1], "--native")) return usage();
  is_native = 1;
  for (int i = 2; i < argc; i += 2) {
    if (!strcmp(argv[i], "--secs"))
      seconds = atof(argv[i + 1]);
    else if (!strcmp(argv[i], "--cpus"))
      cpus = atoi(argv[i + 1]);
    else if (!strcmp(argv[i], "--only"))
      only = argv[i + 1];
    else if (!strcmp(argv[i], "--disk"))
      disk_path = argv[i + 1];
    else if (!strcmp(argv[i], "--programs"))
      root = argv[i + 1];
    else
      return usage();
  }
  say_info();
  if (root && run_programs(root)) {
    perror(root);
    return 1;
  }
  if (!root) run_workloads();
  say("BENCHDONE\n");
  return 0;
}
