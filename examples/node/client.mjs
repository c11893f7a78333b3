// A conversation with a WarmKV server in Node, straight from proto/.
//
//   node client.mjs [HOST:PORT [SECONDS [TOKENS]]]
import { randomUUID } from "node:crypto";
import { fileURLToPath } from "node:url";
import { promisify } from "node:util";
import grpc from "@grpc/grpc-js";
import loader from "@grpc/proto-loader";
import { protoPath as healthProto } from "grpc-health-check";
import protobuf from "protobufjs";

// What finds no server, or one that loads or stops, is tried again. So each request that changes something has a
// requestId: a connection may break when the work is done, and the server does nothing twice under one id.
const retries = {"methodConfig": [{
  "name": [{"service": "warmkv.v1.AgentService"}, {"service": "warmkv.v1.ServerService"}],
  "retryPolicy": {
    "maxAttempts": 5, "initialBackoff": "0.2s", "maxBackoff": "5s", "backoffMultiplier": 3,
    "retryableStatusCodes": ["UNAVAILABLE"]
  }
}]};
// What google.rpc.Status carries; the details are in the protos of Google's API.
const rpc = protobuf.parse(`
  syntax = "proto3";
  message Any { string type_url = 1; bytes value = 2; }
  message Status { int32 code = 1; string message = 2; repeated Any details = 3; }
  message ErrorInfo { string reason = 1; string domain = 2; map<string, string> metadata = 3; }`).root;

const [, , target = "127.0.0.1:50051", seconds = "0", tokens = "0"] = process.argv;
const options = {
  "grpc.service_config": JSON.stringify(retries),
  // A long prefill says nothing for minutes: pings tell a slow server from a dead one.
  "grpc.keepalive_time_ms": 10_000,
  "grpc.keepalive_permit_without_calls": 1,
};
const client = connect(service("warmkv/v1/agent_service.proto").warmkv.v1.AgentService);
const agentId = "example-node";

await ask("Hello! My name is Grace, and I write JavaScript.");
await ask("What is my name?");
await cancel();
await fail();
if (Number(seconds)) await staySilent(Number(seconds));
if (Number(tokens)) await prime(Number(tokens));
client.close();

// Prints an answer as it comes, and then what was reused for it.
async function ask(message) {
  for await (const event of generate(message, { maxTokens: 32 })) {
    if (event.delta) process.stdout.write(event.delta.text);
    if (event.finished) {
      const { cache, timings } = event.finished;
      const first = timings.firstToken.seconds + timings.firstToken.nanos / 1e9;
      const reused = `${cache.cachedTokens} of ${cache.promptTokens} tokens`;
      console.log(`\n[${cache.source.replace("CACHE_SOURCE_", "")}] reused ${reused}, first token in ${first.toFixed(3)} s`);
    }
  }
}

// Leaves an answer in the middle. What was sampled by then is committed.
async function cancel() {
  const stream = generate("Tell me a long story.", { maxTokens: 10_000, ignoreEos: true });
  let tokens = 0;
  try {
    for await (const event of stream) {
      tokens += event.delta?.tokenIds.length ?? 0;
      if (tokens >= 8) stream.cancel();
    }
  } catch (error) {
    if (error.code !== grpc.status.CANCELLED) throw error;
    console.log(`cancelled after ${tokens} tokens`);
  }
}

// An error says what is wrong in words for people, and for programs in a reason and its metadata.
async function fail() {
  try {
    await promisify(client.getAgent.bind(client))({ agentId: "nobody" });
  } catch (error) {
    const status = rpc.lookupType("Status").decode(error.metadata.get("grpc-status-details-bin")[0]);
    const detail = status.details.find((any) => any.typeUrl.endsWith("google.rpc.ErrorInfo"));
    const info = rpc.lookupType("ErrorInfo").decode(detail.value);
    console.log(`${grpc.status[error.code]}: ${info.reason} ${JSON.stringify(info.metadata)}`);
  }
}

// A call that hears nothing for so long lasts to its own deadline, since pings keep the connection.
async function staySilent(seconds) {
  const health = connect(service(healthProto).grpc.health.v1.Health);
  try {
    for await (const _ of health.watch({}, { deadline: Date.now() + seconds * 1000 }));
  } catch (error) {
    if (error.code !== grpc.status.DEADLINE_EXCEEDED) throw error;
  }
  health.close();
  console.log(`silent for ${seconds} s, and still connected`);
}

// Makes a context of so many tokens, and tells how far it is.
async function prime(count) {
  const ids = Array.from({ length: count }, (_, n) => 300 + ((n * n * 11) % 2700));
  const request = { agentId: `${agentId}-long`, content: { tokenIds: { ids } }, requestId: randomUUID() };
  let computed = 0;
  for await (const event of client.primeStream(request, { deadline: Date.now() + 600_000 })) {
    if (event.progress) computed = event.progress.tokensDone;
    if (event.response) {
      const { agent, timings } = event.response;
      console.log(`primed ${agent.tokenCount} tokens in ${timings.prefill.seconds} s, told of ${computed} before`);
    }
  }
}

function generate(message, fields) {
  const content = { chat: { messages: [{ role: "user", content: message }] } };
  const deadline = Date.now() + 300_000;
  return client.generate({ agentId, content, requestId: randomUUID(), ...fields }, { deadline });
}

function service(proto) {
  const includeDirs = [fileURLToPath(new URL("../../proto", import.meta.url))];
  const definition = loader.loadSync(proto, { includeDirs, longs: Number, enums: String, defaults: true, oneofs: true });
  return grpc.loadPackageDefinition(definition);
}

function connect(Service) {
  return new Service(target, grpc.credentials.createInsecure(), options);
}
