// A conversation with a WarmKV server in Go, on stubs generated from proto/.
//
//	client [HOST:PORT [SECONDS [TOKENS]]]
package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"log"
	"os"
	"strconv"
	"strings"
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

const agentID = "example-go"

// What finds a server that loads or stops is tried again. So each request that changes something has a request_id: a
// connection may break when the work is done, and the server does nothing twice under one id.
const retries = `{"methodConfig": [{
  "name": [{"service": "warmkv.v1.AgentService"}, {"service": "warmkv.v1.ServerService"}],
  "retryPolicy": {
    "maxAttempts": 5, "initialBackoff": "0.2s", "maxBackoff": "5s", "backoffMultiplier": 3,
    "retryableStatusCodes": ["UNAVAILABLE"]
  }
}]}`

func main() {
	target, silence := "127.0.0.1:50051", time.Duration(0)
	if len(os.Args) > 1 {
		target = os.Args[1]
	}
	if len(os.Args) > 2 {
		var err error
		silence, err = time.ParseDuration(os.Args[2] + "s")
		check(err)
	}
	connection, err := grpc.NewClient(
		target,
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultServiceConfig(retries),
		// In Go a connection that can't be made isn't tried again for a call that doesn't wait for it.
		grpc.WithDefaultCallOptions(grpc.WaitForReady(true)),
		// A long prefill says nothing for minutes: pings tell a slow server from a dead one.
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 10 * time.Second, PermitWithoutStream: true}),
	)
	check(err)
	defer connection.Close()
	client := warmkv.NewAgentServiceClient(connection)

	ask(client, "Hello! My name is Grace, and I write Go.")
	ask(client, "What is my name?")
	cancel(client)
	fail(client)
	if silence > 0 {
		staySilent(connection, silence)
	}
	if len(os.Args) > 3 {
		tokens, err := strconv.Atoi(os.Args[3])
		check(err)
		prime(client, tokens)
	}
}

// ask prints an answer as it comes, and then what was reused for it.
func ask(client warmkv.AgentServiceClient, message string) {
	ctx, done := context.WithTimeout(context.Background(), 5*time.Minute)
	defer done()
	stream, err := client.Generate(ctx, &warmkv.GenerateRequest{
		AgentId: agentID, Content: fromUser(message), MaxTokens: 32, RequestId: rand.Text(),
	})
	check(err)
	for {
		event, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return
		}
		check(err)
		fmt.Print(event.GetDelta().GetText())
		if finished := event.GetFinished(); finished != nil {
			cache := finished.Cache
			fmt.Printf("\n[%s] reused %d of %d tokens, first token in %.3f s\n",
				strings.TrimPrefix(cache.Source.String(), "CACHE_SOURCE_"), cache.CachedTokens, cache.PromptTokens,
				finished.Timings.FirstToken.AsDuration().Seconds())
		}
	}
}

// cancel leaves an answer in the middle. What was sampled by then is committed.
func cancel(client warmkv.AgentServiceClient) {
	ctx, leave := context.WithCancel(context.Background())
	defer leave()
	stream, err := client.Generate(ctx, &warmkv.GenerateRequest{
		AgentId: agentID, Content: fromUser("Tell me a long story."), MaxTokens: 10_000, IgnoreEos: true, RequestId: rand.Text(),
	})
	check(err)
	tokens := 0
	for {
		event, err := stream.Recv()
		if status.Code(err) == codes.Canceled {
			fmt.Printf("cancelled after %d tokens\n", tokens)
			return
		}
		check(err)
		if tokens += len(event.GetDelta().GetTokenIds()); tokens >= 8 {
			leave()
		}
	}
}

// fail shows that an error says what is wrong in words for people, and for programs in a reason and its metadata.
func fail(client warmkv.AgentServiceClient) {
	_, err := client.GetAgent(context.Background(), &warmkv.GetAgentRequest{AgentId: "nobody"})
	for _, detail := range status.Convert(err).Details() {
		if info, ok := detail.(*errdetails.ErrorInfo); ok {
			fmt.Printf("%v: %s %v\n", status.Code(err), info.Reason, info.Metadata)
		}
	}
}

// staySilent makes a call that hears nothing. It lasts to its own deadline, since pings keep the connection.
func staySilent(connection *grpc.ClientConn, silence time.Duration) {
	ctx, done := context.WithTimeout(context.Background(), silence)
	defer done()
	states, err := healthpb.NewHealthClient(connection).Watch(ctx, &healthpb.HealthCheckRequest{})
	for err == nil {
		_, err = states.Recv()
	}
	if status.Code(err) != codes.DeadlineExceeded {
		log.Fatal(err)
	}
	fmt.Printf("silent for %.0f s, and still connected\n", silence.Seconds())
}

// prime makes a context of so many tokens. The call hears nothing until they are computed, but for the pings.
func prime(client warmkv.AgentServiceClient, tokens int) {
	ctx, done := context.WithTimeout(context.Background(), 10*time.Minute)
	defer done()
	ids := make([]int32, tokens)
	for n := range ids {
		ids[n] = 300 + int32(n*n%2700)
	}
	content := &warmkv.Content{Kind: &warmkv.Content_TokenIds{TokenIds: &warmkv.TokenIds{Ids: ids}}}
	primed, err := client.Prime(ctx, &warmkv.PrimeRequest{AgentId: agentID + "-long", Content: content, RequestId: rand.Text()})
	check(err)
	fmt.Printf("primed %d tokens in %.1f s\n", primed.Agent.TokenCount, primed.Timings.Prefill.AsDuration().Seconds())
}

func fromUser(message string) *warmkv.Content {
	said := []*warmkv.ChatMessage{{Role: "user", Content: message}}
	return &warmkv.Content{Kind: &warmkv.Content_Chat{Chat: &warmkv.ChatMessages{Messages: said}}}
}

func check(err error) {
	if err != nil {
		log.Fatal(err)
	}
}
