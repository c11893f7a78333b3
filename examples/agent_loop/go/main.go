// An agent loop in Go: the model calls a weather and a calculator tool until it has what it needs for an answer.
//
//	go run . [-target HOST:PORT] [-force] [QUESTION]
//
// Only results are sent, and only results are computed: the question, the tools and the calls are in the agent's context
// already. Needs the stubs in v1/ (see README.md), and a server whose model has tools.
package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"log"
	"strconv"
	"strings"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	warmkv "agentloop/v1"
)

const mostRounds = 10

var degrees = map[string]int{"Bern": 11, "Uri": 7, "Zürich": 12}

var tools = []*warmkv.Tool{
	{
		Name:        "weather",
		Description: "The weather at a place, in degrees Celsius.",
		ParametersJson: `{"type": "object", "properties": {"place": {"type": "string", "maxLength": 40}}, ` +
			`"required": ["place"], "additionalProperties": false}`,
	},
	{
		Name:        "calculate",
		Description: "The value of an expression of numbers with + - * / and parentheses.",
		ParametersJson: `{"type": "object", "properties": {"expression": {"type": "string", "maxLength": 60}}, ` +
			`"required": ["expression"], "additionalProperties": false}`,
	},
}

func main() {
	target := flag.String("target", "127.0.0.1:50051", "address of the server")
	agent := flag.String("agent", "loop-go", "whose conversation")
	force := flag.Bool("force", false, "have the first answer ask for the weather, whatever it is")
	flag.Parse()
	question := "How many degrees Fahrenheit does it have in Zürich?"
	if flag.NArg() > 0 {
		question = strings.Join(flag.Args(), " ")
	}
	conn, err := grpc.NewClient(*target, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		log.Fatal(err)
	}
	defer conn.Close()
	client, ctx := warmkv.NewAgentServiceClient(conn), context.Background()
	if _, err := client.DeleteAgent(ctx, &warmkv.DeleteAgentRequest{AgentId: *agent, AllowMissing: true}); err != nil {
		log.Fatal(err)
	}
	answer, err := loop(ctx, client, *agent, question, *force)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(answer)
}

// loop asks, does what the answer calls, and sends what came of it, until an answer calls nothing.
func loop(ctx context.Context, client warmkv.AgentServiceClient, agent, question string, force bool) (string, error) {
	var choice *warmkv.ToolChoice
	if force {
		mode := warmkv.ToolChoiceMode_TOOL_CHOICE_MODE_REQUIRED
		choice = &warmkv.ToolChoice{Mode: mode, AllowedNames: []string{"weather"}, MaxCalls: 1}
	}
	for _, tool := range tools {
		tool.Strict = force // then the arguments are of the tool's schema, too
	}
	asked := &warmkv.ChatMessages{
		Messages: []*warmkv.ChatMessage{{Role: "user", Content: question}},
		Tools:    &warmkv.ToolList{Tools: tools},
	}
	text := ""
	for range mostRounds {
		said, finished, err := ask(ctx, client, agent, asked, choice)
		if err != nil {
			return "", err
		}
		text = said
		fmt.Printf("  %d tokens were there, %d were computed\n", finished.Cache.CachedTokens, finished.Cache.PrefilledTokens)
		if finished.FinishReason != warmkv.FinishReason_FINISH_REASON_TOOL_CALLS {
			break
		}
		choice, asked = nil, &warmkv.ChatMessages{}
		for _, call := range finished.ToolCalls {
			asked.Messages = append(asked.Messages, resultOf(call))
		}
	}
	return text, nil
}

// ask streams an answer to its end.
func ask(ctx context.Context, client warmkv.AgentServiceClient, agent string, asked *warmkv.ChatMessages, choice *warmkv.ToolChoice) (string, *warmkv.GenerateFinished, error) {
	stream, err := client.Generate(ctx, &warmkv.GenerateRequest{
		AgentId: agent, Content: &warmkv.Content{Kind: &warmkv.Content_Chat{Chat: asked}}, MaxTokens: 256, ToolChoice: choice,
	})
	if err != nil {
		return "", nil, err
	}
	text := ""
	for {
		event, err := stream.Recv()
		if err != nil {
			return "", nil, err
		}
		text += event.GetDelta().GetText()
		if finished := event.GetFinished(); finished != nil {
			return text, finished, nil
		}
	}
}

// resultOf does a call. One that can't be done has a result, too: the model can mend it.
func resultOf(finished *warmkv.ToolCallFinished) *warmkv.ChatMessage {
	call := finished.Call
	said, err := "", fmt.Errorf("%v", finished.Status)
	if finished.Status == warmkv.ToolCallStatus_TOOL_CALL_STATUS_VALID {
		said, err = do(call)
	}
	if err != nil {
		said = "error: " + err.Error()
	}
	fmt.Printf("  %s(%s) = %s\n", call.Name, call.ArgumentsJson, said)
	return &warmkv.ChatMessage{Role: "tool", ToolCallId: call.Id, Content: said}
}

func do(call *warmkv.ToolCall) (string, error) {
	arguments := struct{ Place, Expression string }{}
	if err := json.Unmarshal([]byte(call.ArgumentsJson), &arguments); err != nil {
		return "", err
	}
	if call.Name == "weather" {
		found, ok := degrees[arguments.Place]
		if !ok {
			return "", fmt.Errorf("nobody measures in %s", arguments.Place)
		}
		return fmt.Sprintf(`{"sky": "rain", "degrees": %d}`, found), nil
	}
	expression, err := parser.ParseExpr(arguments.Expression)
	if err != nil {
		return "", err
	}
	value, err := valueOf(expression)
	return strconv.FormatFloat(value, 'g', -1, 64), err
}

// valueOf knows numbers and the four operations.
func valueOf(expression ast.Expr) (float64, error) {
	switch node := expression.(type) {
	case *ast.BasicLit:
		return strconv.ParseFloat(node.Value, 64)
	case *ast.ParenExpr:
		return valueOf(node.X)
	case *ast.UnaryExpr:
		value, err := valueOf(node.X)
		if node.Op == token.SUB {
			return -value, err
		}
	case *ast.BinaryExpr:
		left, err := valueOf(node.X)
		if err != nil {
			return 0, err
		}
		right, err := valueOf(node.Y)
		switch node.Op {
		case token.ADD:
			return left + right, err
		case token.SUB:
			return left - right, err
		case token.MUL:
			return left * right, err
		case token.QUO:
			return left / right, err
		}
	}
	return 0, fmt.Errorf("there is more in it than numbers with + - * /")
}
