import com.google.gson.Gson;
import com.google.protobuf.Any;
import com.google.protobuf.InvalidProtocolBufferException;
import com.google.rpc.ErrorInfo;
import io.grpc.Context;
import io.grpc.ManagedChannel;
import io.grpc.Status;
import io.grpc.StatusRuntimeException;
import io.grpc.health.v1.HealthCheckRequest;
import io.grpc.health.v1.HealthCheckResponse;
import io.grpc.health.v1.HealthGrpc;
import io.grpc.netty.shaded.io.grpc.netty.NettyChannelBuilder;
import io.grpc.protobuf.StatusProto;
import java.util.Iterator;
import java.util.Map;
import java.util.UUID;
import java.util.concurrent.TimeUnit;
import warmkv.v1.AgentServiceGrpc;
import warmkv.v1.AgentServiceGrpc.AgentServiceBlockingStub;
import warmkv.v1.CacheReport;
import warmkv.v1.ChatMessage;
import warmkv.v1.ChatMessages;
import warmkv.v1.Content;
import warmkv.v1.GenerateRequest;
import warmkv.v1.GenerateResponse;
import warmkv.v1.GetAgentRequest;
import warmkv.v1.PrimeRequest;
import warmkv.v1.PrimeResponse;
import warmkv.v1.TokenIds;

/**
 * A conversation with a WarmKV server in Java, on stubs generated from proto/.
 *
 * <pre>mvn compile exec:java -Dexec.args="[HOST:PORT [SECONDS [TOKENS]]]"</pre>
 */
public final class Client {
  private static final String AGENT = "example-java";

  /**
   * What finds no server, or one that loads or stops, is tried again. So each request that changes something has a
   * request_id: a connection may break when the work is done, and the server does nothing twice under one id.
   */
  private static final String RETRIES = """
      {"methodConfig": [{
        "name": [{"service": "warmkv.v1.AgentService"}, {"service": "warmkv.v1.ServerService"}],
        "retryPolicy": {
          "maxAttempts": 5, "initialBackoff": "0.2s", "maxBackoff": "5s", "backoffMultiplier": 3,
          "retryableStatusCodes": ["UNAVAILABLE"]
        }
      }]}""";

  public static void main(String[] arguments) throws InterruptedException, InvalidProtocolBufferException {
    String target = arguments.length > 0 ? arguments[0] : "127.0.0.1:50051";
    long seconds = arguments.length > 1 ? Long.parseLong(arguments[1]) : 0;
    @SuppressWarnings("unchecked")
    Map<String, ?> retries = new Gson().fromJson(RETRIES, Map.class);
    ManagedChannel channel =
        NettyChannelBuilder.forTarget(target)
            .usePlaintext()
            .defaultServiceConfig(retries)
            // A long prefill says nothing for minutes: pings tell a slow server from a dead one.
            .keepAliveTime(10, TimeUnit.SECONDS)
            .keepAliveWithoutCalls(true)
            .build();
    AgentServiceBlockingStub client = AgentServiceGrpc.newBlockingStub(channel);

    ask(client, "Hello! My name is Grace, and I write Java.");
    ask(client, "What is my name?");
    cancel(client);
    fail(client);
    if (seconds > 0) {
      staySilent(channel, seconds);
    }
    if (arguments.length > 2) {
      prime(client, Integer.parseInt(arguments[2]));
    }
    channel.shutdownNow().awaitTermination(10, TimeUnit.SECONDS);
  }

  /** Prints an answer as it comes, and then what was reused for it. */
  private static void ask(AgentServiceBlockingStub client, String message) {
    GenerateRequest request = fromUser(message).setMaxTokens(32).build();
    Iterator<GenerateResponse> events = client.withDeadlineAfter(5, TimeUnit.MINUTES).generate(request);
    while (events.hasNext()) {
      GenerateResponse event = events.next();
      System.out.print(event.getDelta().getText());
      if (event.hasFinished()) {
        CacheReport cache = event.getFinished().getCache();
        var first = event.getFinished().getTimings().getFirstToken();
        System.out.printf(
            "%n[%s] reused %d of %d tokens, first token in %.3f s%n",
            cache.getSource().name().replace("CACHE_SOURCE_", ""),
            cache.getCachedTokens(),
            cache.getPromptTokens(),
            first.getSeconds() + first.getNanos() / 1e9);
      }
    }
  }

  /** Leaves an answer in the middle. What was sampled by then is committed. */
  private static void cancel(AgentServiceBlockingStub client) {
    GenerateRequest request = fromUser("Tell me a long story.").setMaxTokens(10_000).setIgnoreEos(true).build();
    Context.CancellableContext listening = Context.current().withCancellation();
    listening.run(
        () -> {
          int tokens = 0;
          try {
            for (Iterator<GenerateResponse> events = client.generate(request); events.hasNext(); ) {
              tokens += events.next().getDelta().getTokenIdsCount();
              if (tokens >= 8) {
                listening.cancel(null);
              }
            }
          } catch (StatusRuntimeException ended) {
            expect(Status.Code.CANCELLED, ended);
            System.out.printf("cancelled after %d tokens%n", tokens);
          }
        });
  }

  /** An error says what is wrong in words for people, and for programs in a reason and its metadata. */
  private static void fail(AgentServiceBlockingStub client) throws InvalidProtocolBufferException {
    try {
      client.getAgent(GetAgentRequest.newBuilder().setAgentId("nobody").build());
    } catch (StatusRuntimeException error) {
      for (Any detail : StatusProto.fromThrowable(error).getDetailsList()) {
        if (detail.is(ErrorInfo.class)) {
          ErrorInfo info = detail.unpack(ErrorInfo.class);
          System.out.printf("%s: %s %s%n", error.getStatus().getCode(), info.getReason(), info.getMetadataMap());
        }
      }
    }
  }

  /** A call that hears nothing for so long lasts to its own deadline, since pings keep the connection. */
  private static void staySilent(ManagedChannel channel, long seconds) {
    Iterator<HealthCheckResponse> states =
        HealthGrpc.newBlockingStub(channel)
            .withDeadlineAfter(seconds, TimeUnit.SECONDS)
            .watch(HealthCheckRequest.getDefaultInstance());
    try {
      while (states.hasNext()) {
        states.next();
      }
    } catch (StatusRuntimeException ended) {
      expect(Status.Code.DEADLINE_EXCEEDED, ended);
    }
    System.out.printf("silent for %d s, and still connected%n", seconds);
  }

  /** Makes a context of so many tokens. The call hears nothing until they are computed, but for the pings. */
  private static void prime(AgentServiceBlockingStub client, int tokens) {
    TokenIds.Builder ids = TokenIds.newBuilder();
    for (long n = 0; n < tokens; n++) {
      ids.addIds(300 + (int) (n * n * 7 % 2700));
    }
    PrimeRequest request =
        PrimeRequest.newBuilder()
            .setAgentId(AGENT + "-long")
            .setContent(Content.newBuilder().setTokenIds(ids))
            .setRequestId(UUID.randomUUID().toString())
            .build();
    PrimeResponse primed = client.withDeadlineAfter(10, TimeUnit.MINUTES).prime(request);
    System.out.printf(
        "primed %d tokens in %d s%n",
        primed.getAgent().getTokenCount(), primed.getTimings().getPrefill().getSeconds());
  }

  private static GenerateRequest.Builder fromUser(String message) {
    ChatMessage said = ChatMessage.newBuilder().setRole("user").setContent(message).build();
    return GenerateRequest.newBuilder()
        .setAgentId(AGENT)
        .setContent(Content.newBuilder().setChat(ChatMessages.newBuilder().addMessages(said)))
        .setRequestId(UUID.randomUUID().toString());
  }

  private static void expect(Status.Code code, StatusRuntimeException ended) {
    if (ended.getStatus().getCode() != code) {
      throw ended;
    }
  }
}
