// Paths through the guest's kernel: system calls, processes, faults, signals, files, timers.
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "bench.h"

static uint64_t run_syscall(void) {
  uint64_t sum = 0;
  for (int i = 0; i < 2000; i++) sum += syscall(SYS_getppid) > 0;
  return sum;
}

static uint64_t run_clock_gettime(void) {
  uint64_t sum = 0;
  for (int i = 0; i < 5000; i++) sum += now() > 0;
  return sum;
}

static int ping[2], pong[2];
static pid_t partner;
static int setup_pipes(void) {
  if (pipe(ping) || pipe(pong)) return SETUP_FAILED;
  if ((partner = fork()) == 0) {
    char c;
    close(ping[1]);
    close(pong[0]);
    while (read(ping[0], &c, 1) == 1) {
      c++;
      if (write(pong[1], &c, 1) != 1) break;
    }
    _exit(0);
  }
  close(ping[0]);
  close(pong[1]);
  return SETUP_OK;
}
static uint64_t run_pingpong(void) {
  char c = 0;
  for (int i = 0; i < 200; i++)
    if (write(ping[1], &c, 1) != 1 || read(pong[0], &c, 1) != 1) return 0;
  return (uint8_t)c;
}
static void finish_pipes(void) {
  close(ping[1]);
  close(pong[0]);
  waitpid(partner, NULL, 0);
}

static int ends_with(pid_t child, int code) {
  int status;
  return waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == code;
}
static uint64_t run_fork_exec(void) {
  uint64_t ended = 0;
  for (int i = 0; i < 4; i++) {
    pid_t child = fork();
    if (!child) {
      execl("/proc/self/exe", EXIT_AT_ONCE, (char *)NULL);
      _exit(3);
    }
    ended += ends_with(child, EXIT_AT_ONCE_CODE);
  }
  return ended == 4;
}
static uint64_t run_fork_wait(void) {
  uint64_t ended = 0;
  for (int i = 0; i < 8; i++) {
    pid_t child = fork();
    if (!child) _exit(7);
    ended += ends_with(child, 7);
  }
  return ended == 8;
}

static uint64_t run_page_faults(
    void) {  // a read fault of the zero page, then a write fault, on each page
  size_t size = 4 << 20;
  uint64_t sum = 0;
  uint8_t *pages = map_small_pages(size);
  for (size_t i = 0; i < size; i += 4096) {
    sum += pages[i];
    pages[i] = 1;
  }
  munmap(pages, size);
  return sum + 1;
}

#define PROTECTED_SIZE (1 << 16)
static uint8_t *protected_pages;
static int setup_mprotect(void) {
  protected_pages = map_small_pages(PROTECTED_SIZE);
  if (!protected_pages) return SETUP_FAILED;
  memset(protected_pages, 1, PROTECTED_SIZE);
  return SETUP_OK;
}
static uint64_t run_mprotect(void) {
  for (int i = 0; i < 200; i++) {
    mprotect(protected_pages, PROTECTED_SIZE, PROT_READ);
    mprotect(protected_pages, PROTECTED_SIZE, PROT_READ | PROT_WRITE);
    protected_pages[(i & 15) << 12] ^= 1;
  }
  return 1;
}

static volatile int signals;
static void on_signal(int number) {
  (void)number;
  signals++;
}
static int setup_signal(void) {
  return signal(SIGUSR1, on_signal) == SIG_ERR ? SETUP_FAILED : SETUP_OK;
}
static uint64_t run_signal(void) {
  int before = signals;
  for (int i = 0; i < 400; i++) kill(getpid(), SIGUSR1);
  return signals - before;
}

static char directory[64];
static int setup_files(void) {
  snprintf(directory, sizeof directory, "/dev/shm/bench-%d", (int)getpid());
  return mkdir(directory, 0755);
}
static uint64_t run_files(void) {
  static char content[16384];
  char path[100];
  uint64_t good = 0;
  for (int i = 0; i < 40; i++) {
    snprintf(path, sizeof path, "%s/%d", directory, i & 7);
    int fd = open(path, O_CREAT | O_RDWR | O_TRUNC, 0644);
    if (fd < 0) return 0;
    struct stat status;
    good += write(fd, content, sizeof content) == (ssize_t)sizeof content;
    good += fstat(fd, &status) == 0 && status.st_size == (off_t)sizeof content;
    close(fd);
    unlink(path);
  }
  return good;
}
static void finish_files(void) { rmdir(directory); }

static double seconds_late;
static int sleeps;
static uint64_t run_sleep(void) {
  for (int i = 0; i < 50; i++) {
    struct timespec length = {0, 1000000};
    double start = now();
    nanosleep(&length, NULL);
    seconds_late += now() - start - 1e-3;
    sleeps++;
  }
  return 1;
}
static double microseconds_late(void) { return seconds_late / sleeps * 1e6; }

const struct workload kernel_workloads[] = {
    {.name = "syscall", .unit = "kcall/s", .work = 2, .run = run_syscall},
    {.name = "clock_gettime", .unit = "kcall/s", .work = 5, .run = run_clock_gettime},
    {.name = "pipe_pingpong",
     .unit = "kround/s",
     .work = 0.2,
     .setup = setup_pipes,
     .run = run_pingpong,
     .finish = finish_pipes},
    {.name = "fork_exec", .unit = "proc/s", .work = 4, .run = run_fork_exec},
    {.name = "fork_wait", .unit = "proc/s", .work = 8, .run = run_fork_wait},
    {.name = "page_fault", .unit = "kpage/s", .work = 1.024, .run = run_page_faults},
    {.name = "mprotect",
     .unit = "kcall/s",
     .work = 0.4,
     .setup = setup_mprotect,
     .run = run_mprotect},
    {.name = "signal", .unit = "ksignal/s", .work = 0.4, .setup = setup_signal, .run = run_signal},
    {.name = "file_tmpfs",
     .unit = "kfile/s",
     .work = 0.04,
     .setup = setup_files,
     .run = run_files,
     .finish = finish_files},
    {.name = "timer_1ms_late", .unit = "us", .run = run_sleep, .measured = microseconds_late},
    {0}};
