// Writes as a database's log does, for `tools/bench guest`: 4 KiB at a random place of a disk, then fdatasync, for some
// seconds. Prints: writes, and the median, the 99th percentile and the worst of them in microseconds.
// Then whole MiB in order, with one fdatasync at the end: prints bytes per second.
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec + t.tv_nsec / 1e9;
}

static int by_size(const void *a, const void *b) {
  double d = *(const double *)a - *(const double *)b;
  return (d > 0) - (d < 0);
}

int main(int argc, char **argv) {
  if (argc != 4) return 2;
  int fd = open(argv[1], O_RDWR);
  long size = atol(argv[2]), most = 1000000, count = 0;
  double limit = atof(argv[3]), *took = calloc(most, sizeof *took);
  char *buffer = malloc(1 << 20);
  if (fd < 0 || !took || !buffer) return 1;
  memset(buffer, 0x5a, 1 << 20);
  for (double begun = now(); now() < begun + limit && count < most; count++) {
    double start = now();
    long place = ((long)random() << 12) % size & ~4095L;
    if (pwrite(fd, buffer, 4096, place) != 4096 || fdatasync(fd)) return 1;
    took[count] = now() - start;
  }
  qsort(took, count, sizeof *took, by_size);
  printf("%ld %.0f %.0f %.0f ", count, took[count / 2] * 1e6, took[count * 99 / 100] * 1e6, took[count - 1] * 1e6);
  double start = now();
  long written = 0;
  while (now() < start + limit) {
    if (pwrite(fd, buffer, 1 << 20, written % size) != 1 << 20) return 1;
    written += 1 << 20;
    if (written % (16 << 20) == 0 && fdatasync(fd)) return 1;
  }
  if (fdatasync(fd)) return 1;
  printf("%.0f\n", written / (now() - start));
  return 0;
}
