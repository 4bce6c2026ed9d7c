// SPDX-License-Identifier: Apache-2.0
/*
 * short_lives DIRECTORY FIRST COUNT WORKERS: many cgroups of 1 to 20 ms CPU time, each removed at once.
 *
 * Every other one is entered by CLONE_INTO_CGROUP, the others by a write to cgroup.procs. One line each on standard
 * output: cgroup id, usage_usec of its cpu.stat just before the removal, once it has settled.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define SHORTEST_NS 1000000
#define LONGEST_NS 20000000
/* Unchanged for so long: more than a virtual CPU is held up by its host (2.2 ms was seen) or by its emulator. */
#define SETTLED_US 20000

static long long cpu_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &now);
	return now.tv_sec * 1000000000LL + now.tv_nsec;
}

static void fail(const char *what)
{
	perror(what);
	_exit(1);
}

static void burn(long long ns)
{
	while (cpu_ns() < ns)
		;
	_exit(0);
}

static long usage_us(int cgroup)
{
	char text[512];
	long usage = -1;
	int fd = openat(cgroup, "cpu.stat", O_RDONLY), length = read(fd, text, sizeof(text) - 1);

	close(fd);
	if (length <= 0)
		fail("cpu.stat");
	text[length] = 0;
	sscanf(text, "usage_usec %ld", &usage);
	return usage;
}

/* What a task used for its own exit is counted when its CPU has left it, which is after its parent heard of it. */
static long settled_usage_us(int cgroup)
{
	long before, now = usage_us(cgroup);

	do {
		before = now;
		usleep(SETTLED_US);
		now = usage_us(cgroup);
	} while (now != before);
	return now;
}

static pid_t start_inside(int cgroup)
{
	struct clone_args arguments = {.flags = CLONE_INTO_CGROUP, .exit_signal = SIGCHLD, .cgroup = cgroup};

	return syscall(SYS_clone3, &arguments, sizeof(arguments));
}

static pid_t start_and_enter(int cgroup)
{
	pid_t child = fork();

	if (child == 0) {
		int procs = openat(cgroup, "cgroup.procs", O_WRONLY);

		if (procs < 0 || write(procs, "0", 1) != 1)
			fail("cgroup.procs");
		close(procs);
	}
	return child;
}

static void live_and_die(const char *directory, int number)
{
	char path[512], line[64];
	long long ns = SHORTEST_NS + (rand() % 10 ? rand() % 2000000 : rand() % (LONGEST_NS - SHORTEST_NS));
	struct stat status;
	int cgroup, length;
	pid_t child;
	long usage;

	snprintf(path, sizeof(path), "%s/docker-%064x.scope", directory, number);
	if (mkdir(path, 0755) || stat(path, &status) || (cgroup = open(path, O_RDONLY | O_DIRECTORY)) < 0)
		fail(path);
	child = number % 2 ? start_inside(cgroup) : start_and_enter(cgroup);
	if (child < 0)
		fail("clone");
	if (child == 0)
		burn(ns);
	if (waitpid(child, NULL, 0) != child)
		fail("waitpid");
	usage = settled_usage_us(cgroup);
	close(cgroup);
	while (rmdir(path))
		if (errno != EBUSY)
			fail(path);
	length = snprintf(line, sizeof(line), "%lu %ld\n", status.st_ino, usage);
	if (write(STDOUT_FILENO, line, length) != length)
		fail("write");
}

int main(int count, char **arguments)
{
	int first, last, workers;

	if (count != 5)
		return 2;
	first = atoi(arguments[2]);
	last = first + atoi(arguments[3]);
	workers = atoi(arguments[4]);
	for (int worker = 0; worker < workers; worker++) {
		if (fork() == 0) {
			srand(first + worker + 1);
			for (int number = first + worker; number < last; number += workers)
				live_and_die(arguments[1], number);
			_exit(0);
		}
	}
	for (int worker = 0, status; worker < workers; worker++)
		if (wait(&status) < 0 || status)
			return 1;
	return 0;
}
