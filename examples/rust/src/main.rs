//! A conversation with a WarmKV server in Rust, on stubs generated from proto/.
//!
//!     cargo run -- [HOST:PORT [SECONDS]]

use std::io::{Write, stdout};
use std::time::Duration;

use tokio::time::sleep;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Status, Streaming};
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};
use tonic_types::StatusExt;
use uuid::Uuid;

use warmkv::agent_service_client::AgentServiceClient;
use warmkv::generate_response::Event;
use warmkv::{ChatMessage, ChatMessages, Content, GenerateRequest, GenerateResponse, GetAgentRequest, content::Kind};

mod warmkv {
    tonic::include_proto!("warmkv.v1");
}

type Client = AgentServiceClient<Channel>;
type Outcome<T = ()> = Result<T, Box<dyn std::error::Error>>;

const AGENT: &str = "example-rust";
const DEADLINE: Duration = Duration::from_secs(300);

#[tokio::main]
async fn main() -> Outcome {
    let arguments: Vec<String> = std::env::args().collect();
    let target = arguments.get(1).map_or("127.0.0.1:50051", String::as_str);
    let silence: u64 = arguments.get(2).map_or(Ok(0), |seconds| seconds.parse())?;
    let channel = Endpoint::from_shared(format!("http://{target}"))?
        // A long prefill says nothing for minutes: pings tell a slow server from a dead one.
        .http2_keep_alive_interval(Duration::from_secs(10))
        .keep_alive_while_idle(true)
        .connect_lazy();
    let client = Client::new(channel.clone());

    ask(&client, "Hello! My name is Grace, and I write Rust.").await?;
    ask(&client, "What is my name?").await?;
    cancel(&client).await?;
    fail(&client).await?;
    if silence > 0 {
        stay_silent(channel, Duration::from_secs(silence)).await?;
    }
    Ok(())
}

/// Prints an answer as it comes, and then what was reused for it.
async fn ask(client: &Client, message: &str) -> Outcome {
    let request = GenerateRequest { max_tokens: 32, ..from_user(message) };
    let mut stream = generate(client, request).await?;
    while let Some(response) = stream.message().await? {
        match response.event {
            Some(Event::Delta(delta)) => {
                print!("{}", delta.text);
                stdout().flush()?;
            }
            Some(Event::Finished(finished)) => {
                let cache = finished.cache.unwrap_or_default();
                let first = finished.timings.unwrap_or_default().first_token.unwrap_or_default();
                println!(
                    "\n[{}] reused {} of {} tokens, first token in {:.3} s",
                    cache.source().as_str_name().trim_start_matches("CACHE_SOURCE_"),
                    cache.cached_tokens,
                    cache.prompt_tokens,
                    Duration::try_from(first)?.as_secs_f64(),
                );
            }
            _ => {}
        }
    }
    Ok(())
}

/// Leaves an answer in the middle, by dropping its stream. What was sampled by then is committed.
async fn cancel(client: &Client) -> Outcome {
    let request = GenerateRequest { max_tokens: 10_000, ignore_eos: true, ..from_user("Tell me a long story.") };
    let mut stream = generate(client, request).await?;
    let mut tokens = 0;
    while tokens < 8 {
        if let Some(Event::Delta(delta)) = stream.message().await?.and_then(|response| response.event) {
            tokens += delta.token_ids.len();
        }
    }
    drop(stream);
    println!("cancelled after {tokens} tokens");
    Ok(())
}

/// An error says what is wrong in words for people, and for programs in a reason and its metadata.
async fn fail(client: &Client) -> Outcome {
    let asked = retrying(async || {
        client.clone().get_agent(GetAgentRequest { agent_id: "nobody".into() }).await
    });
    if let Err(error) = asked.await {
        let info = error.get_details_error_info().ok_or("the error has no details")?;
        println!("{:?}: {} {:?}", error.code(), info.reason, info.metadata);
    }
    Ok(())
}

/// A call that hears nothing for so long lasts to its own deadline, since pings keep the connection.
async fn stay_silent(channel: Channel, silence: Duration) -> Outcome {
    let mut states = HealthClient::new(channel).watch(HealthCheckRequest::default()).await?.into_inner();
    let listening = async { while states.message().await?.is_some() {} Err::<(), Status>(Status::unknown("it ended")) };
    match tokio::time::timeout(silence, listening).await {
        Ok(ended) => ended?,
        Err(_) => println!("silent for {} s, and still connected", silence.as_secs()),
    }
    Ok(())
}

async fn generate(client: &Client, message: GenerateRequest) -> Result<Streaming<GenerateResponse>, Status> {
    let response = retrying(async || {
        let mut request = Request::new(message.clone());
        request.set_timeout(DEADLINE);
        client.clone().generate(request).await
    });
    Ok(response.await?.into_inner())
}

/// What finds no server, or one that loads or stops, is tried again, which tonic leaves to its callers.
async fn retrying<T>(call: impl AsyncFn() -> Result<T, Status>) -> Result<T, Status> {
    let mut pause = Duration::from_millis(200);
    for _ in 1..5 {
        match call().await {
            Err(error) if error.code() == Code::Unavailable => {
                let told = error.get_details_retry_info().and_then(|info| info.retry_delay);
                sleep(told.unwrap_or(pause)).await;
                pause = (3 * pause).min(Duration::from_secs(5));
            }
            outcome => return outcome,
        }
    }
    call().await
}

/// A request with an id of its own: a connection may break when the work is done, and the server does nothing twice
/// under one id.
fn from_user(message: &str) -> GenerateRequest {
    let said = ChatMessage { role: "user".into(), content: message.into(), ..Default::default() };
    GenerateRequest {
        agent_id: AGENT.into(),
        content: Some(Content { kind: Some(Kind::Chat(ChatMessages { messages: vec![said], ..Default::default() })) }),
        request_id: Uuid::new_v4().to_string(),
        ..Default::default()
    }
}
