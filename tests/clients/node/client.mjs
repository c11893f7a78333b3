// A WarmKV client in Node, straight from proto/: what a Node programmer would write in the first ten minutes.
// It throws if the server doesn't do what the contract says.
import assert from "node:assert/strict";
import { promisify } from "node:util";
import grpc from "@grpc/grpc-js";
import loader from "@grpc/proto-loader";

const [, , address, protoRoot] = process.argv;
const definition = loader.loadSync("warmkv/v1/agent_service.proto", {
  includeDirs: [protoRoot],
  longs: Number,
  enums: String,
  defaults: true,
  oneofs: true,
});
const { AgentService } = grpc.loadPackageDefinition(definition).warmkv.v1;
const client = new AgentService(address, grpc.credentials.createInsecure());
const call = (name, request) => promisify(client[name].bind(client))(request);

const primed = await call("Prime", { agentId: "node", content: { text: "The quick brown fox jumps over the lazy dog." } });
assert.equal(primed.persisted, true);

const hot = await generate("Once upon a time");
assert.equal(hot.finished.cache.source, "CACHE_SOURCE_HOT");
assert.equal(hot.finished.cache.cachedTokens, primed.agent.tokenCount);
assert.equal(hot.tokens, 16);

let computed = 0;
let response;
for await (const event of client.PrimeStream({ agentId: "node-2", content: { text: "The fox and the dog. ".repeat(400) } })) {
  assert.equal(response, undefined, "something followed the response");
  if (event.progress) computed = Math.max(computed, event.progress.tokensDone);
  else response = event.response;
}
assert.ok(computed > 0 && computed <= response.agent.tokenCount, `progress told of ${computed} tokens`);

await call("EvictAgent", { agentId: "node" });
const warm = await generate("Once upon a time");
assert.equal(warm.finished.cache.source, "CACHE_SOURCE_WARM");
assert.equal(warm.text, hot.text);

const stream = client.Generate({ agentId: "node", content: { text: "And" }, maxTokens: 10_000, ignoreEos: true });
await assert.rejects(async () => {
  for await (const event of stream) if (event.delta) stream.cancel();
}, { code: grpc.status.CANCELLED });

await call("DeleteAgent", { agentId: "node" });
await assert.rejects(call("GetAgent", { agentId: "node" }), { code: grpc.status.NOT_FOUND });
client.close();
console.log("node client: hot and warm answers are the same");

// An answer that the agent doesn't keep, so that the next one starts from the same context.
async function generate(text) {
  const answer = { text: "", tokens: 0, finished: undefined };
  const request = { agentId: "node", content: { text }, maxTokens: 16, ignoreEos: true, ephemeral: true, sampling: { temperature: 0 } };
  for await (const event of client.Generate(request)) {
    if (event.delta) {
      answer.text += event.delta.text;
      answer.tokens += event.delta.tokenIds.length;
    }
    if (event.finished) answer.finished = event.finished;
  }
  return answer;
}
