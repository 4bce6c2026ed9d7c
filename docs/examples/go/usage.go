package main

import (
	"crypto/sha256"
	"log"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	pb "weighbridge.example/client/stubs/weighbridge/v1"
)

// Runs the command; what it and its children used is the next batch of the stream. Encoded here, and never again.
func measure(me identity, held []*pb.Item, tenant string, words []string) *pb.Item {
	start, startBoottime := time.Now(), boottime()
	cpuUsage := run(words)
	duration := boottime() - startBoottime

	cpuKnown := uint64(1) << pb.Measure_MEASURE_CPU_USAGE_NS
	batch := &pb.UsageBatch{
		SchemaVersion: 1, AgentId: me.AgentID, Epoch: uint64(start.UnixMicro()), Seq: 1, Tenant: tenant,
		IntervalStartUnixNs: uint64(start.UnixNano()), IntervalDurationNs: uint64(duration),
		BootId: strings.TrimSpace(string(must(os.ReadFile("/proc/sys/kernel/random/boot_id")))),
		Host:   must(os.Hostname()), Producer: producer, Cpus: uint32(runtime.NumCPU()),
		Flags:    uint32(pb.BatchFlag_BATCH_FLAG_LONG_INTERVAL), // aligned to nothing: it may cross an hour
		Coverage: uint32(pb.Coverage_COVERAGE_CPU),
		Table: &pb.UsageBatch_Containers{Containers: &pb.ContainerTable{
			CgroupId:   []uint64{uint64(start.UnixNano())}, // no cgroup has it, no other command of this boot gets it
			CgroupPath: []string{"/command"},
			Kind:       []uint32{uint32(pb.UnitKind_UNIT_KIND_OTHER)},
		}},
		RowFlags: []uint32{uint32(pb.RowFlag_ROW_FLAG_FINAL)},
		Known:    []uint64{cpuKnown}, CpuUsageNs: []uint64{uint64(cpuUsage)},
		Openings: []*pb.Opening{{Row: 0, Known: cpuKnown}}, // born within the epoch: from zero
	}
	if len(held) > 0 {
		last := held[len(held)-1]
		var before pb.UsageBatch
		check(proto.Unmarshal(last.Batch, &before))
		batch.Epoch, batch.Seq, batch.PreviousDigest = last.Epoch, last.Seq+1, last.Digest
		if batch.IntervalStartUnixNs < before.IntervalEndUnixNs { // intervals of a stream never overlap
			batch.IntervalStartUnixNs = before.IntervalEndUnixNs
			batch.Flags |= uint32(pb.BatchFlag_BATCH_FLAG_CLOCK_STEPPED_BACK)
		}
	}
	batch.IntervalEndUnixNs = batch.IntervalStartUnixNs + batch.IntervalDurationNs

	body := must(proto.Marshal(batch))
	digest := sha256.Sum256(body)
	return &pb.Item{Epoch: batch.Epoch, Seq: batch.Seq, Digest: digest[:], Batch: body}
}

// CPU time of the command and of the children that it waited for.
func run(words []string) time.Duration {
	signal.Notify(make(chan os.Signal, 1), os.Interrupt, unix.SIGTERM) // an interrupted command has used CPU, too
	defer signal.Reset()
	command := exec.Command(words[0], words[1:]...)
	command.Stdin, command.Stdout, command.Stderr = os.Stdin, os.Stdout, os.Stderr
	err := command.Run()
	if command.ProcessState == nil {
		log.Fatal(err)
	}
	return command.ProcessState.UserTime() + command.ProcessState.SystemTime()
}

// CLOCK_BOOTTIME in nanoseconds: nobody can set it, and it goes on while the host sleeps.
func boottime() int64 {
	var now unix.Timespec
	check(unix.ClockGettime(unix.CLOCK_BOOTTIME, &now))
	return now.Nano()
}
