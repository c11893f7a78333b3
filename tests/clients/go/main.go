// A WarmKV client in Go, on stubs generated from proto/: what a Go programmer would write in the first ten minutes.
// It fails with a message if the server doesn't do what the contract says.
package main

import (
	"context"
	"fmt"
	"io"
	"log"
	"os"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/status"

	warmkv "warmkv/v1"
)

func main() {
	conn, err := grpc.NewClient(
		os.Args[1],
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		// The shortest time that Go allows.
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 10 * time.Second, PermitWithoutStream: true}),
	)
	check(err)
	defer conn.Close()
	silence, longest := make(chan error), make(chan error)
	go func() { silence <- staySilent(conn) }()
	go func() { longest <- primeLongest(conn) }()
	client := warmkv.NewAgentServiceClient(conn)
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()

	primed, err := client.Prime(ctx, &warmkv.PrimeRequest{AgentId: "go", Content: text("The quick brown fox jumps over the lazy dog.")})
	check(err)
	require(primed.Persisted, "the primed context is not durable")

	answer, hot := generate(ctx, client, "Once upon a time")
	require(hot.Cache.Source == warmkv.CacheSource_CACHE_SOURCE_HOT, "the first answer was not hot: %v", hot.Cache)
	require(hot.Cache.CachedTokens == primed.Agent.TokenCount, "not the whole context was reused: %v", hot.Cache)

	_, err = client.EvictAgent(ctx, &warmkv.EvictAgentRequest{AgentId: "go"})
	check(err)
	again, warm := generate(ctx, client, "Once upon a time")
	require(warm.Cache.Source == warmkv.CacheSource_CACHE_SOURCE_WARM, "after EvictAgent it was not warm: %v", warm.Cache)
	require(answer == again, "hot and warm answers differ: %q and %q", answer, again)

	_, err = client.DeleteAgent(ctx, &warmkv.DeleteAgentRequest{AgentId: "go"})
	check(err)
	_, err = client.GetAgent(ctx, &warmkv.GetAgentRequest{AgentId: "go"})
	require(status.Code(err) == codes.NotFound, "a deleted agent gave %v", err)
	for _, detail := range status.Convert(err).Details() {
		if info, ok := detail.(*errdetails.ErrorInfo); ok {
			require(info.Reason == "AGENT_NOT_FOUND" && info.Domain == "warmkv", "wrong error info %v", info)
			check(<-silence)
			check(<-longest)
			fmt.Printf("go client: pinged through a call silent for %v\n", silent)
			fmt.Printf("go client: hot first token in %v, warm in %v\n", hot.Timings.FirstToken.AsDuration(), warm.Timings.FirstToken.AsDuration())
			return
		}
	}
	log.Fatalf("the error carries no ErrorInfo: %v", err)
}

// silent is long enough for three pings.
const silent = 45 * time.Second

// staySilent makes a call that hears nothing: it has to end by its own deadline, not by a server that minds the pings.
func staySilent(conn *grpc.ClientConn) error {
	ctx, cancel := context.WithTimeout(context.Background(), silent)
	defer cancel()
	states, err := healthpb.NewHealthClient(conn).Watch(ctx, &healthpb.HealthCheckRequest{})
	for err == nil {
		_, err = states.Recv()
	}
	if status.Code(err) != codes.DeadlineExceeded {
		return fmt.Errorf("the silent call ended with %w", err)
	}
	return nil
}

// primeLongest primes an agent with the longest context of the server. The call hears nothing until that is computed.
func primeLongest(conn *grpc.ClientConn) error {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Minute)
	defer cancel()
	info, err := warmkv.NewServerServiceClient(conn).GetServerInfo(ctx, &warmkv.GetServerInfoRequest{})
	if err != nil {
		return err
	}
	ids := make([]int32, info.ContextLimit)
	for n := range ids {
		ids[n] = 300 + int32(n*n%2700)
	}
	began := time.Now()
	content := &warmkv.Content{Kind: &warmkv.Content_TokenIds{TokenIds: &warmkv.TokenIds{Ids: ids}}}
	primed, err := warmkv.NewAgentServiceClient(conn).Prime(ctx, &warmkv.PrimeRequest{AgentId: "go-longest", Content: content})
	if err != nil {
		return fmt.Errorf("the Prime of %d tokens ended after %v with %w", len(ids), time.Since(began), err)
	}
	if primed.Agent.TokenCount != info.ContextLimit || !primed.Persisted {
		return fmt.Errorf("the Prime of %d tokens left %v", len(ids), primed)
	}
	fmt.Printf("go client: primed %d tokens in %v\n", len(ids), time.Since(began))
	return nil
}

// generate streams an answer that the agent doesn't keep, so that the next one starts from the same context.
func generate(ctx context.Context, client warmkv.AgentServiceClient, prompt string) (string, *warmkv.GenerateFinished) {
	temperature := float32(0)
	stream, err := client.Generate(ctx, &warmkv.GenerateRequest{
		AgentId: "go", Content: text(prompt), MaxTokens: 16, IgnoreEos: true, Ephemeral: true,
		Sampling: &warmkv.SamplingParams{Temperature: &temperature},
	})
	check(err)
	answer, tokens := "", 0
	for {
		event, err := stream.Recv()
		check(err)
		if delta := event.GetDelta(); delta != nil {
			answer += delta.Text
			tokens += len(delta.TokenIds)
		}
		if finished := event.GetFinished(); finished != nil {
			_, err = stream.Recv()
			require(err == io.EOF, "something followed finished: %v", err)
			require(tokens == 16, "%d tokens were streamed", tokens)
			return answer, finished
		}
	}
}

func text(content string) *warmkv.Content {
	return &warmkv.Content{Kind: &warmkv.Content_Text{Text: content}}
}

func check(err error) {
	require(err == nil, "%v", err)
}

func require(condition bool, format string, arguments ...any) {
	if !condition {
		log.Fatalf("go client: "+format, arguments...)
	}
}
