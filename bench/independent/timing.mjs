// Times Generate streams from Node, to check the benchmark's own stopwatch. Shares nothing with it but proto/.
//
//   node timing.mjs HOST:PORT PROTO_ROOT
//
// Each line of standard input is a request: {"agent", "ids", "tokens"}. Each line of output is its timing in milliseconds:
// {"ttft", "itl", "e2e", "tokens"}, ITL being the median gap between tokens. The requests are ephemeral and greedy.
import readline from "node:readline";
import grpc from "@grpc/grpc-js";
import loader from "@grpc/proto-loader";

const [, , address, protoRoot] = process.argv;
const definition = loader.loadSync("warmkv/v1/agent_service.proto", { includeDirs: [protoRoot], longs: Number, oneofs: true });
const { AgentService } = grpc.loadPackageDefinition(definition).warmkv.v1;
const client = new AgentService(address, grpc.credentials.createInsecure());
await new Promise((resolve, reject) =>
  client.waitForReady(Date.now() + 10_000, (error) => (error ? reject(error) : resolve())),
);

for await (const line of readline.createInterface({ input: process.stdin })) {
  const { agent, ids, tokens } = JSON.parse(line);
  const request = {
    agentId: agent,
    content: { tokenIds: { ids } },
    maxTokens: tokens,
    ignoreEos: true,
    ephemeral: true,
    sampling: { temperature: 0 },
  };
  console.log(JSON.stringify(await timed(request)));
}
client.close();

function timed(request) {
  return new Promise((resolve, reject) => {
    const times = [];
    const begin = performance.now();
    const stream = client.Generate(request);
    stream.on("data", (message) => {
      const now = performance.now() - begin;
      if (message.delta) for (const _ of message.delta.tokenIds) times.push(now);
    });
    stream.on("error", reject);
    stream.on("end", () => {
      const gaps = times.slice(1).map((time, index) => time - times[index]);
      resolve({ ttft: times[0], itl: median(gaps), e2e: performance.now() - begin, tokens: times.length });
    });
  });
}

function median(values) {
  const sorted = values.toSorted((a, b) => a - b);
  const middle = sorted.length >> 1;
  return sorted.length % 2 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2;
}
