//! `polyhead serve`: a model behind the HTTP interface that OpenAI's clients and lm-eval speak.

mod asked;
mod worker;

use std::convert::Infallible;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{SyncSender, TrySendError, sync_channel};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::Router;
use axum::body::Bytes;
use axum::extract::rejection::BytesRejection;
use axum::extract::{DefaultBodyLimit, State};
use axum::http::StatusCode;
use axum::response::sse::{self, Sse};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use clap::Args;
use polyhead_runs::{Failure, open_decoder};
use serde_json::{Value, json};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};
use tokio::sync::{oneshot, watch};

use crate::allowed::user;
use crate::console::talk;
use asked::{Model, Refused};
use worker::{Answered, Event, Job};

/// What is served, and where.
#[derive(Debug, Args)]
pub struct ServeArgs {
    /// A checkpoint, a run folder, or a folder in Hugging Face's format.
    pub checkpoint: PathBuf,
    /// The port; 0 takes a free one, which is told.
    #[arg(long, default_value_t = 8080)]
    pub port: u16,
    /// The address. There is no password: another one than this machine's own opens the model to everybody who reaches it.
    #[arg(long, default_value = "127.0.0.1")]
    pub host: std::net::IpAddr,
    /// Default: the recipe's.
    #[arg(long, value_parser = crate::cli::device())]
    pub device: Option<String>,
}

/// Requests that wait at most, before others are sent away; chosen by us.
const WAITING: usize = 256;

/// How long a stopping server waits for clients that are slow to take what they are told; chosen by us.
const PATIENCE: Duration = Duration::from_secs(5);

/// Bytes of a request at most; chosen by us.
const BODY: usize = 16 << 20;

/// What all requests share.
struct Server {
    model: Model,
    name: String,
    jobs: SyncSender<Job>,
    requests: AtomicU64,
    stopping: watch::Receiver<bool>,
}

/// Which of the two kinds of requests.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Completion,
    Chat,
}

/// Serves a model until a signal ends it.
pub fn serve(args: &ServeArgs) -> Result<(), Failure> {
    let trained = open_decoder(&args.checkpoint, args.device.as_deref(), user())?;
    let model = Model::of(&trained)?;
    let tokenizer = model.tokenizer.clone();
    let name = args.checkpoint.display().to_string();
    let (jobs, received) = sync_channel(WAITING);
    let (stop, stopping) = watch::channel(false);
    let server = Arc::new(Server { model, name, jobs, requests: AtomicU64::new(0), stopping: stopping.clone() });
    let (alive, ended) = oneshot::channel::<()>();
    std::thread::Builder::new().name("model".into()).spawn(move || {
        let _dropped_at_the_end = alive;
        worker::work(&trained.model, &tokenizer, &received, &stopping);
    })?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(listen(server, SocketAddr::new(args.host, args.port), stop, ended))
}

/// Answers requests until a signal; those on their way are told that the server is stopping. `model` ends where the thread of
/// the model does, which no request should bring about.
async fn listen(
    server: Arc<Server>,
    address: SocketAddr,
    stop: watch::Sender<bool>,
    model: oneshot::Receiver<()>,
) -> Result<(), Failure> {
    let failed = |error| Failure::Run(format!("cannot serve at {address}: {error}\n  hint: --port names another port"));
    let listener = tokio::net::TcpListener::bind(address).await.map_err(failed)?;
    let bound = listener.local_addr().map_err(failed)?;
    talk!("serving {} at http://{bound}/v1 (completions, chat/completions, models); Ctrl-C ends", server.name);
    let stopped = is_set(stop.subscribe());
    let serving = axum::serve(listener, routes(server)).with_graceful_shutdown(stopped);
    let mut serving = tokio::spawn(serving.into_future());
    let broken = tokio::select! {
        () = signal() => false,
        _ = model => true,
    };
    talk!("stopping");
    // Nobody listens any more where there is no request.
    let _ = stop.send(true);
    // A second signal leaves at once.
    tokio::select! {
        _ = &mut serving => {}
        () = tokio::time::sleep(PATIENCE) => {}
        () = signal() => {}
    }
    match broken {
        true => Err(Failure::Run("the model's thread has ended".into())),
        false => Ok(()),
    }
}

/// Waits until it is true, or will never be.
async fn is_set(mut flag: watch::Receiver<bool>) {
    let _ = flag.wait_for(|set| *set).await;
}

fn routes(server: Arc<Server>) -> Router {
    let unknown = || async {
        let known = "/v1/completions, /v1/chat/completions, /v1/models and /health are there";
        problem(StatusCode::NOT_FOUND, &format!("no such path: {known}"), None)
    };
    Router::new()
        .route("/v1/completions", post(|server, body| respond(server, body, Kind::Completion)))
        .route("/v1/chat/completions", post(|server, body| respond(server, body, Kind::Chat)))
        .route("/v1/models", get(models))
        .route("/health", get(|| async { "ok" }))
        .fallback(unknown)
        .method_not_allowed_fallback(|| async {
            let known = "POST asks for completions, GET for /v1/models and /health";
            problem(StatusCode::METHOD_NOT_ALLOWED, &format!("not by this method: {known}"), None)
        })
        .layer(DefaultBodyLimit::max(BODY))
        .with_state(server)
}

/// A signal to leave.
async fn signal() {
    #[cfg(unix)]
    if let Ok(mut terminate) = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate()) {
        tokio::select! {
            _ = tokio::signal::ctrl_c() => {}
            _ = terminate.recv() => {}
        }
        return;
    }
    // Without a handler a signal ends the process as it would anyway.
    let _ = tokio::signal::ctrl_c().await;
}

async fn models(State(server): State<Arc<Server>>) -> Response {
    let model = json!({ "id": server.name, "object": "model", "created": 0, "owned_by": "polyhead" });
    json_of(StatusCode::OK, &json!({ "object": "list", "data": [model] }))
}

async fn respond(State(server): State<Arc<Server>>, body: Result<Bytes, BytesRejection>, kind: Kind) -> Response {
    let body = match body {
        Ok(body) => body,
        Err(rejected) => return problem(rejected.status(), &rejected.body_text(), None),
    };
    let number = server.requests.fetch_add(1, Ordering::SeqCst);
    let asked = match kind {
        Kind::Completion => server.model.completion(&body, number),
        Kind::Chat => server.model.chat(&body, number),
    };
    let asked = match asked {
        Ok(asked) => asked,
        Err(Refused { problem: told, key }) => return problem(StatusCode::BAD_REQUEST, &told, key.as_deref()),
    };
    let about = About { server: server.clone(), number, kind };
    let stream = asked.stream;
    let (reply, events) = unbounded_channel();
    match server.jobs.try_send(Job { asked, reply }) {
        Ok(()) => {}
        Err(TrySendError::Full(_)) => {
            return problem(StatusCode::SERVICE_UNAVAILABLE, "too many requests are waiting: try again later", None);
        }
        Err(TrySendError::Disconnected(_)) => return gone(),
    }
    let mut events = until_stopped(events, server.stopping.clone());
    if stream {
        return Sse::new(about.events(events)).into_response();
    }
    match events.recv().await {
        Some(Event::Done(answered)) => json_of(StatusCode::OK, &about.answer(&answered)),
        _ => gone(),
    }
}

/// Events as they come, until the server stops: a client is told at once, whatever the model is busy with.
fn until_stopped(mut events: UnboundedReceiver<Event>, stopping: watch::Receiver<bool>) -> UnboundedReceiver<Event> {
    let (pass, passed) = unbounded_channel();
    tokio::spawn(async move {
        let stopped = is_set(stopping);
        tokio::pin!(stopped);
        loop {
            let event = tokio::select! {
                event = events.recv() => event,
                () = &mut stopped => None,
                // The client has gone; the model sees it by the channel that ends here.
                () = pass.closed() => None,
            };
            match event {
                Some(event) => drop(pass.send(event)),
                None => break,
            }
        }
    });
    passed
}

/// What a request is told that will not be answered.
const STOPPING: &str = "the server is stopping";

/// The model does not answer any more.
fn gone() -> Response {
    problem(StatusCode::SERVICE_UNAVAILABLE, STOPPING, None)
}

fn json_of(status: StatusCode, value: &Value) -> Response {
    (status, [("content-type", "application/json")], value.to_string()).into_response()
}

fn problem(status: StatusCode, told: &str, key: Option<&str>) -> Response {
    json_of(status, &problem_json(told, status, key))
}

/// A refusal, as OpenAI's interface writes one.
fn problem_json(told: &str, status: StatusCode, key: Option<&str>) -> Value {
    let kind = if status.is_client_error() { "invalid_request_error" } else { "server_error" };
    json!({ "error": { "message": told, "type": kind, "param": key, "code": null } })
}

/// What every answer to a request says.
struct About {
    server: Arc<Server>,
    number: u64,
    kind: Kind,
}

impl About {
    fn envelope(&self, object: &str, choices: Vec<Value>) -> Value {
        let id = if self.kind == Kind::Chat { "chatcmpl" } else { "cmpl" };
        let created = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        json!({ "id": format!("{id}-{}", self.number), "object": object, "created": created, "model": self.server.name,
            "choices": choices })
    }

    fn answer(&self, answered: &Answered) -> Value {
        let choice = |(index, choice): (usize, &worker::Choice)| match self.kind {
            Kind::Chat => json!({ "index": index, "finish_reason": choice.finish.name(), "logprobs": null,
                "message": { "role": "assistant", "content": choice.text } }),
            Kind::Completion => json!({ "index": index, "finish_reason": choice.finish.name(), "text": choice.text,
                "logprobs": choice.logprobs }),
        };
        let choices = answered.choices.iter().enumerate().map(choice).collect();
        let object = if self.kind == Kind::Chat { "chat.completion" } else { "text_completion" };
        let mut whole = self.envelope(object, choices);
        let (before, new) = (answered.prompt_tokens, answered.completion_tokens);
        whole["usage"] = json!({ "prompt_tokens": before, "completion_tokens": new, "total_tokens": before + new });
        whole
    }

    /// A piece of a streamed answer; `None` as text is its end.
    fn piece(&self, text: Option<&str>, finish: Option<&str>) -> Value {
        let choice = match self.kind {
            Kind::Chat => {
                let delta = text.map_or(json!({}), |text| json!({ "role": "assistant", "content": text }));
                json!({ "index": 0, "delta": delta, "finish_reason": finish })
            }
            Kind::Completion => json!({ "index": 0, "text": text.unwrap_or_default(), "finish_reason": finish }),
        };
        let object = if self.kind == Kind::Chat { "chat.completion.chunk" } else { "text_completion" };
        self.envelope(object, vec![choice])
    }

    /// The pieces of an answer as they come, then `[DONE]`.
    fn events(
        self,
        events: UnboundedReceiver<Event>,
    ) -> impl futures_core::Stream<Item = Result<sse::Event, Infallible>> {
        Pieces { about: self, events, ended: false, over: false }
    }
}

/// A streamed answer.
struct Pieces {
    about: About,
    events: UnboundedReceiver<Event>,
    /// Whether the last piece was sent.
    ended: bool,
    /// Whether what comes behind it was.
    over: bool,
}

impl futures_core::Stream for Pieces {
    type Item = Result<sse::Event, Infallible>;

    fn poll_next(
        mut self: std::pin::Pin<&mut Self>,
        context: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<Self::Item>> {
        let told = |value: Value| Some(Ok(sse::Event::default().data(value.to_string())));
        self.events.poll_recv(context).map(|event| match event {
            Some(Event::Text(text)) => told(self.about.piece(Some(&text), None)),
            Some(Event::Done(answered)) => {
                let finish = answered.choices.first().map(|choice| choice.finish.name());
                self.ended = true;
                told(self.about.piece(None, finish))
            }
            // The model has let go of it: because all is said, or because the server is stopping.
            None if self.over => None,
            None => {
                self.over = true;
                match self.ended {
                    true => Some(Ok(sse::Event::default().data("[DONE]"))),
                    false => told(problem_json(STOPPING, StatusCode::SERVICE_UNAVAILABLE, None)),
                }
            }
        })
    }
}
