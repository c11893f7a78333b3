import io.grpc.ManagedChannel;
import io.grpc.Status;
import io.grpc.StatusRuntimeException;
import io.grpc.health.v1.HealthCheckRequest;
import io.grpc.health.v1.HealthCheckResponse;
import io.grpc.health.v1.HealthCheckResponse.ServingStatus;
import io.grpc.health.v1.HealthGrpc;
import io.grpc.netty.shaded.io.grpc.netty.NettyChannelBuilder;
import java.util.Iterator;
import java.util.concurrent.Future;
import java.util.concurrent.TimeUnit;
import warmkv.v1.AgentServiceGrpc;
import warmkv.v1.CacheSource;
import warmkv.v1.Content;
import warmkv.v1.GenerateFinished;
import warmkv.v1.GenerateRequest;
import warmkv.v1.GenerateResponse;
import warmkv.v1.GetServerInfoRequest;
import warmkv.v1.PrimeRequest;
import warmkv.v1.PrimeResponse;
import warmkv.v1.ServerServiceGrpc;
import warmkv.v1.TokenIds;

/**
 * A WarmKV client in Java that asks every 10 seconds, the shortest time that Java allows, whether its connection lives.
 * It fails with a message if the server doesn't do what the contract says.
 */
public final class Client {
  private static final long SILENT_SECONDS = 45;

  public static void main(String[] arguments) throws Exception {
    ManagedChannel channel =
        NettyChannelBuilder.forTarget(arguments[0])
            .usePlaintext()
            .keepAliveTime(10, TimeUnit.SECONDS)
            .keepAliveWithoutCalls(true)
            .build();
    AgentServiceGrpc.AgentServiceBlockingStub agents = AgentServiceGrpc.newBlockingStub(channel);

    PrimeResponse primed =
        agents.prime(PrimeRequest.newBuilder().setAgentId("java").setContent(text("Once upon a time")).build());
    require(primed.getPersisted(), "the primed context is not durable");
    GenerateFinished finished = generate(agents, " there was");
    require(finished.getCache().getSource() == CacheSource.CACHE_SOURCE_HOT, "the answer was not hot");
    require(finished.getUsage().getCompletionTokens() == 8, "the answer has another length");
    int longest =
        ServerServiceGrpc.newBlockingStub(channel)
            .getServerInfo(GetServerInfoRequest.getDefaultInstance())
            .getContextLimit();
    Future<PrimeResponse> priming = AgentServiceGrpc.newFutureStub(channel).prime(longest(longest));
    staySilent(channel);
    PrimeResponse whole = priming.get(10, TimeUnit.MINUTES);
    require(whole.getAgent().getTokenCount() == longest && whole.getPersisted(), "the longest context is not there");
    require(generate(agents, " and then").getAgent().getRevision() == 3, "after the silence it was another agent");

    channel.shutdownNow().awaitTermination(10, TimeUnit.SECONDS);
    System.out.printf("java client: pinged through a call silent for %d s, primed %d tokens%n", SILENT_SECONDS, longest);
  }

  /** A Prime of so many tokens hears nothing until they are computed. */
  private static PrimeRequest longest(int tokens) {
    TokenIds.Builder ids = TokenIds.newBuilder();
    for (int n = 0; n < tokens; n++) {
      ids.addIds(300 + (int) ((long) n * n * 7 % 2700));
    }
    return PrimeRequest.newBuilder()
        .setAgentId("java-longest")
        .setContent(Content.newBuilder().setTokenIds(ids))
        .build();
  }

  /** A call that hears nothing ends by its own deadline, and not by a server that minds the pings. */
  private static void staySilent(ManagedChannel channel) {
    Iterator<HealthCheckResponse> states =
        HealthGrpc.newBlockingStub(channel)
            .withDeadlineAfter(SILENT_SECONDS, TimeUnit.SECONDS)
            .watch(HealthCheckRequest.getDefaultInstance());
    require(states.next().getStatus() == ServingStatus.SERVING, "the server does not serve");
    try {
      require(!states.hasNext(), "the state changed");
    } catch (StatusRuntimeException ended) {
      require(ended.getStatus().getCode() == Status.Code.DEADLINE_EXCEEDED, "the call ended with " + ended.getStatus());
    }
  }

  private static GenerateFinished generate(AgentServiceGrpc.AgentServiceBlockingStub agents, String words) {
    GenerateRequest request =
        GenerateRequest.newBuilder().setAgentId("java").setContent(text(words)).setMaxTokens(8).setIgnoreEos(true).build();
    GenerateResponse last = GenerateResponse.getDefaultInstance();
    for (Iterator<GenerateResponse> events = agents.generate(request); events.hasNext(); ) {
      last = events.next();
    }
    require(last.hasFinished(), "the answer did not finish");
    return last.getFinished();
  }

  private static Content text(String words) {
    return Content.newBuilder().setText(words).build();
  }

  private static void require(boolean condition, String otherwise) {
    if (!condition) {
      throw new AssertionError("java client: " + otherwise);
    }
  }
}
