// A client of the Weighbridge collector: it runs a command and bills its CPU time to a tenant, once. README.md beside
// this file has the rules that it keeps. Any error ends it: what is in the spool goes out with the next run.
package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"log"
	"os"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"

	pb "weighbridge.example/client/stubs/weighbridge/v1"
)

const (
	producer      = "example-client/1"
	deliverWithin = 10 * time.Minute
	leastRetry    = 100 * time.Millisecond
)

// What `weighbridge-agent enroll` leaves behind.
type identity struct {
	AgentID    string   `json:"agent_id"`
	Collectors []string `json:"collectors"`
	CA         string   `json:"ca_pem"`
	Chain      string   `json:"certificate_chain_pem"`
	Key        string   `json:"key_pem"`
}

func main() {
	log.SetFlags(0)
	if len(os.Args) < 3 || len(os.Args) == 4 {
		log.Fatal("usage: client IDENTITY SPOOL [TENANT COMMAND [ARGUMENT ...]]")
	}
	var me identity
	check(json.Unmarshal(must(os.ReadFile(os.Args[1])), &me))
	spool := lock(os.Args[2])
	items := spool.read()
	if len(os.Args) > 4 {
		if len(items) >= mostHeld {
			log.Fatalf("%s: %d batches wait: run without a command until a collector has them", spool, len(items))
		}
		items = append(items, measure(me, items, os.Args[3], os.Args[4:]))
		spool.write(items) // before anybody hears of it
	}
	if len(items) == 0 {
		return
	}
	rejected := deliver(me, items, spool)
	spool.write(items[len(items)-1:]) // the next batch is numbered after it and chained to it
	if rejected > 0 {
		log.Fatalf("%d batches were rejected: see `weighbridge-collector log cat --rejected`", rejected)
	}
}

// Returns when all of it is settled, with the number of batches that were rejected for ever.
func deliver(me identity, items []*pb.Item, spool spool) (rejected int) {
	ctx, cancel := context.WithTimeout(context.Background(), deliverWithin)
	defer cancel()
	connection := must(grpc.NewClient(me.Collectors[0], grpc.WithTransportCredentials(me.credentials()),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 30 * time.Second, Timeout: 10 * time.Second})))
	defer connection.Close()
	stream := must(pb.NewIngestClient(connection).Deliver(ctx))
	ask := func(request *pb.DeliverRequest) *pb.DeliverResponse {
		_ = stream.Send(request) // why it failed is what Recv says
		return must(stream.Recv())
	}

	nextSeq := items[len(items)-1].Seq + 1
	hello := &pb.Hello{Epoch: items[0].Epoch, OldestSeq: items[0].Seq, NextSeq: nextSeq, Producer: producer}
	welcome := ask(&pb.DeliverRequest{Kind: &pb.DeliverRequest_Hello{Hello: hello}}).GetWelcome()
	if welcome.GetWatermark() >= nextSeq {
		spool.setAside("it is an older copy of itself")
	}
	for len(items) > 0 { // one at a time and in order: within any max_in_flight
		delivery := &pb.Delivery{Items: items[:1]}
		answer := ask(&pb.DeliverRequest{Kind: &pb.DeliverRequest_Delivery{Delivery: delivery}}).GetAnswers().Answers[0]
		fmt.Println(answer.Seq, answer.Status, answer.Reason, answer.Detail)
		switch {
		case answer.Reason == pb.Reason_REASON_IDENTITY_CONFLICT:
			spool.setAside(answer.Detail)
		case answer.Status == pb.Status_STATUS_RETRY, answer.Reason == pb.Reason_REASON_DIGEST_MISMATCH:
			time.Sleep(max(leastRetry, time.Duration(answer.RetryAfterMs)*time.Millisecond))
		case answer.Status == pb.Status_STATUS_REJECTED:
			rejected++
			items = items[1:]
		default: // ACCEPTED, DUPLICATE, PARKED: durable there
			items = items[1:]
		}
	}
	_ = stream.CloseSend() // all is settled, whatever becomes of the stream
	_, _ = stream.Recv()
	return rejected
}

func (me identity) credentials() credentials.TransportCredentials {
	authorities := x509.NewCertPool()
	authorities.AppendCertsFromPEM([]byte(me.CA))
	pair := must(tls.X509KeyPair([]byte(me.Chain), []byte(me.Key)))
	return credentials.NewTLS(&tls.Config{
		RootCAs: authorities, Certificates: []tls.Certificate{pair}, MinVersion: tls.VersionTLS13,
	})
}

func check(err error) {
	if err != nil {
		log.Fatal(err)
	}
}

func must[T any](value T, err error) T {
	check(err)
	return value
}
