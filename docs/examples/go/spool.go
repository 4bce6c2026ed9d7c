package main

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"log"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	pb "weighbridge.example/client/stubs/weighbridge/v1"
)

// Of a collector that is away for longer no further command is run.
const mostHeld = 10_000

// One file: a serialised Delivery of all that is not settled, and of the last batch always. Replaced as a whole.
type spool string

// Waits for other runs, since two writers would give one number to two batches. The lock ends with the process.
func lock(path string) spool {
	file := must(unix.Open(path+".lock", unix.O_CREAT|unix.O_RDWR|unix.O_CLOEXEC, 0o600))
	check(unix.Flock(file, unix.LOCK_EX))
	return spool(path)
}

func (s spool) read() []*pb.Item {
	data, err := os.ReadFile(string(s))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	check(err)
	var held pb.Delivery
	if proto.Unmarshal(data, &held) != nil {
		s.setAside("it is damaged")
	}
	for _, item := range held.Items {
		if digest := sha256.Sum256(item.Batch); !bytes.Equal(digest[:], item.Digest) {
			s.setAside(fmt.Sprintf("batch %d is damaged", item.Seq))
		}
	}
	return held.Items
}

// Returns when it is on the disk, and would be there after a power cut.
func (s spool) write(items []*pb.Item) {
	fresh := must(os.OpenFile(string(s)+".new", os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o600))
	must(fresh.Write(must(proto.Marshal(&pb.Delivery{Items: items}))))
	check(fresh.Sync())
	check(fresh.Close())
	check(os.Rename(fresh.Name(), string(s)))
	directory := must(os.Open(filepath.Dir(string(s))))
	check(directory.Sync())
	check(directory.Close())
}

// Keeps the file for a person and ends; the next run begins a new epoch.
func (s spool) setAside(why string) {
	aside := fmt.Sprintf("%s.aside-%d", s, time.Now().UnixNano())
	check(os.Rename(string(s), aside))
	log.Fatalf("%s: %s; it is kept as %s, and the next run begins a new epoch", s, why, aside)
}
