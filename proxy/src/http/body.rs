//! Bodies on their way through: counted, copied for a second attempt while that is cheap, and reported at their end.

use std::collections::VecDeque;
use std::fmt;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, LazyLock, Mutex, PoisonError};
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;

use bytes::Bytes;
use http::HeaderMap;
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use tokio::time::Sleep;

use super::deadline::Deadline;
use super::error::Error;
use super::exchange::Exchange;
use super::expect::Asked;
use super::headers::grpc_status;
use super::idle::Idle;
use super::turns::{Reading, Turn};
use crate::room::Watched;
use crate::traffic::retry::BODY_COPY;
use crate::upstream::{Checkout, Lease};

/// Why a body ended early.
#[derive(Debug)]
pub enum BodyError {
    /// The other side's connection or stream broke. hyper finds the HTTP/2 error code in the source chain, so a reset is
    /// passed on with its meaning.
    Hyper(hyper::Error),
    /// The request's deadline has passed.
    Deadline(Deadline),
    /// Nothing moved for so long.
    Idle {
        /// The time.
        time: Duration,
        /// Of a gRPC call, which ends with a status.
        grpc: bool,
    },
    /// Its caller did not read it for so long, while others waited for its room at the app.
    Unread(Duration),
    /// The attempt that reads this body is no longer the current one.
    Superseded,
}

impl fmt::Display for BodyError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Hyper(error) => error.fmt(f),
            Self::Deadline(deadline) => write!(f, "{} has passed", deadline.set_by()),
            Self::Idle { time, .. } => Error::Idle(*time).fmt(f),
            Self::Unread(time) => write!(f, "the caller did not read for {time:?} (stallTimeout)"),
            Self::Superseded => f.write_str("another attempt is under way"),
        }
    }
}

/// With what a proxy of ours ends an answer that its caller does not read, so that the caller's proxy holds it against
/// nobody. No other reset means that whoever hears of it is to blame.
pub(crate) const UNREAD: h2::Reason = h2::Reason::ENHANCE_YOUR_CALM;

impl std::error::Error for BodyError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        static CALM: LazyLock<h2::Error> = LazyLock::new(|| UNREAD.into());
        match self {
            Self::Hyper(error) => Some(error),
            Self::Unread(_) => Some(&*CALM),
            Self::Deadline(_) | Self::Idle { .. } | Self::Superseded => None,
        }
    }
}

/// A request's body on its way out.
#[derive(Default)]
pub enum RequestBody {
    /// Nothing.
    #[default]
    Empty,
    /// As it comes; there is one attempt.
    Streamed(Incoming, Passing),
    /// As it comes, while what came is kept for another attempt.
    Kept(Attempt),
    /// As it comes, once the server has asked for it.
    Asked(Asked, Incoming, Passing),
}

impl Body for RequestBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        match &mut *self {
            Self::Empty => Poll::Ready(None),
            Self::Streamed(body, passing) => {
                let frame = ready!(passing.poll_frame(body, cx));
                Poll::Ready(frame.map(|frame| frame.map_err(BodyError::Hyper)))
            }
            Self::Kept(attempt) => attempt.poll_frame(cx),
            Self::Asked(asked, ..) => {
                ready!(asked.as_mut().poll(cx));
                if let Self::Asked(_, body, passing) = std::mem::take(&mut *self) {
                    *self = Self::Streamed(body, passing);
                }
                self.poll_frame(cx)
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Empty => true,
            Self::Streamed(body, _) | Self::Asked(_, body, _) => body.is_end_stream(),
            Self::Kept(attempt) => attempt.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Empty => SizeHint::with_exact(0),
            Self::Streamed(body, _) | Self::Asked(_, body, _) => body.size_hint(),
            Self::Kept(attempt) => attempt.size_hint(),
        }
    }
}

/// What passed of a request's body.
#[derive(Debug, Default)]
pub struct Passed {
    bytes: AtomicU64,
    broke: AtomicBool,
    waited_for: AtomicBool,
}

impl Passed {
    /// Bytes of it.
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Relaxed)
    }

    /// Whether more of it is wanted, and does not come.
    pub(crate) fn is_waited_for(&self) -> bool {
        self.waited_for.load(Relaxed)
    }

    /// Whether it broke off: whoever sent it is gone, or makes no sense.
    pub fn broke(&self) -> bool {
        self.broke.load(Relaxed)
    }
}

/// What is to be told of a request's body as it passes.
#[derive(Clone, Debug, Default)]
pub struct Passing {
    pub(crate) passed: Arc<Passed>,
    /// Its connection is told of its end.
    reading: Option<Arc<Mutex<Reading>>>,
}

impl Passing {
    /// Of a connection that hears of the body's end.
    pub(crate) fn read_from(reading: Reading) -> Self {
        Self { passed: Arc::default(), reading: Some(Arc::new(Mutex::new(reading))) }
    }

    fn poll_frame(
        &self,
        body: &mut Incoming,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let frame = poll_useful_frame(body, cx);
        self.passed.waited_for.store(frame.is_pending(), Relaxed);
        if let Poll::Ready(frame) = &frame {
            self.saw(frame.as_ref(), body);
        }
        frame
    }

    fn saw(&self, frame: Option<&Result<Frame<Bytes>, hyper::Error>>, body: &Incoming) {
        if let Some(data) = frame.and_then(|frame| frame.as_ref().ok()?.data_ref()) {
            self.passed.bytes.fetch_add(data.len() as u64, Relaxed);
        }
        if frame.is_some_and(Result::is_err) {
            self.passed.broke.store(true, Relaxed);
        }
        let over = frame.is_none() || body.is_end_stream() && frame.is_some_and(Result::is_ok);
        if let Some(reading) = self.reading.as_ref().filter(|_| over) {
            reading.lock().unwrap_or_else(PoisonError::into_inner).end();
        }
    }
}

/// Frames that stayed here, of all bodies of this process. Written only by whoever sends such frames.
static EMPTY_FRAMES: AtomicU64 = AtomicU64::new(0);

/// How many empty DATA frames were not passed on.
pub(crate) fn empty_frames() -> u64 {
    EMPTY_FRAMES.load(Relaxed)
}

/// The next frame that says something. Empty DATA frames that end nothing stay here: HTTP/2 libraries count them towards
/// a flood, and on a shared connection the flood would be everybody's.
fn poll_useful_frame(body: &mut Incoming, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
    loop {
        let frame = ready!(Pin::new(&mut *body).poll_frame(cx));
        let says_nothing = matches!(&frame, Some(Ok(frame)) if frame.data_ref().is_some_and(Bytes::is_empty));
        if !says_nothing {
            return Poll::Ready(frame);
        }
        EMPTY_FRAMES.fetch_add(1, Relaxed);
    }
}

/// A body of which the beginning is kept, so that it can be sent again.
pub struct Keeper {
    shared: Arc<Mutex<Kept>>,
}

struct Kept {
    body: Incoming,
    /// What came so far; `None` once it was more than is kept, or broke off.
    frames: Option<VecDeque<Piece>>,
    bytes: usize,
    passing: Passing,
    ended: bool,
    /// Which attempt may read on.
    attempt: u32,
    /// Who waits for more: the attempt before, once there is another.
    waits: Option<Waker>,
}

#[derive(Clone)]
enum Piece {
    Data(Bytes),
    Trailers(HeaderMap),
}

impl Keeper {
    /// Keeps up to 64 KiB of `body`.
    pub(crate) fn new(body: Incoming, passing: Passing) -> Self {
        let kept =
            Kept { body, frames: Some(VecDeque::new()), bytes: 0, passing, ended: false, attempt: 0, waits: None };
        Self { shared: Arc::new(Mutex::new(kept)) }
    }

    /// The body from its beginning, for one more attempt; `None` when the beginning is no longer there. An earlier attempt
    /// that still reads gets an error.
    pub fn attempt(&self) -> Option<RequestBody> {
        let mut kept = lock(&self.shared);
        kept.frames.as_ref()?;
        kept.attempt += 1;
        kept.waits.take().into_iter().for_each(Waker::wake);
        kept.passing.passed.waited_for.store(false, Relaxed);
        Some(RequestBody::Kept(Attempt { shared: Arc::clone(&self.shared), at: 0, number: kept.attempt }))
    }

    /// Whether all of it came, and is kept.
    pub(crate) fn is_complete(&self) -> bool {
        let kept = lock(&self.shared);
        kept.frames.is_some() && (kept.ended || kept.body.is_end_stream())
    }

    /// Whether [`Keeper::attempt`] would give a body.
    pub fn is_whole(&self) -> bool {
        lock(&self.shared).frames.is_some()
    }
}

/// Never contended: one attempt reads at a time, on one worker.
fn lock(shared: &Mutex<Kept>) -> std::sync::MutexGuard<'_, Kept> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One attempt's view of a kept body.
pub struct Attempt {
    shared: Arc<Mutex<Kept>>,
    at: usize,
    number: u32,
}

impl Attempt {
    fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let mut kept = lock(&self.shared);
        if kept.attempt != self.number {
            return Poll::Ready(Some(Err(BodyError::Superseded)));
        }
        if let Some(piece) = kept.frames.as_ref().and_then(|frames| frames.get(self.at)) {
            self.at += 1;
            return Poll::Ready(Some(Ok(match piece.clone() {
                Piece::Data(data) => Frame::data(data),
                Piece::Trailers(trailers) => Frame::trailers(trailers),
            })));
        }
        if kept.ended {
            return Poll::Ready(None);
        }
        let Kept { body, passing, .. } = &mut *kept;
        let Poll::Ready(frame) = passing.poll_frame(body, cx) else {
            kept.waits = Some(cx.waker().clone());
            return Poll::Pending;
        };
        let frame = match frame {
            None => {
                kept.ended = true;
                return Poll::Ready(None);
            }
            Some(Err(error)) => {
                // Half a request: asked again, the connection that it came on would say that this was all.
                kept.frames = None;
                return Poll::Ready(Some(Err(BodyError::Hyper(error))));
            }
            Some(Ok(frame)) => frame,
        };
        kept.keep(&frame);
        self.at += 1;
        Poll::Ready(Some(Ok(frame)))
    }

    fn is_end_stream(&self) -> bool {
        let kept = lock(&self.shared);
        let nothing_kept = kept.frames.as_ref().is_none_or(|frames| self.at >= frames.len());
        nothing_kept && (kept.ended || kept.body.is_end_stream())
    }

    fn size_hint(&self) -> SizeHint {
        let kept = lock(&self.shared);
        let waiting: u64 = kept.frames.iter().flatten().skip(self.at).map(Piece::len).sum();
        let rest = kept.body.size_hint();
        let mut hint = SizeHint::new();
        hint.set_lower(rest.lower() + waiting);
        if let Some(upper) = rest.upper() {
            hint.set_upper(upper + waiting);
        }
        hint
    }
}

impl Piece {
    fn len(&self) -> u64 {
        match self {
            Self::Data(data) => data.len() as u64,
            Self::Trailers(_) => 0,
        }
    }
}

impl Kept {
    fn keep(&mut self, frame: &Frame<Bytes>) {
        let Some(frames) = &mut self.frames else { return };
        let piece = match (frame.data_ref(), frame.trailers_ref()) {
            (Some(data), _) => Piece::Data(data.clone()),
            (_, Some(trailers)) => Piece::Trailers(trailers.clone()),
            _ => return,
        };
        self.bytes += piece.len() as usize;
        // Many tiny frames cost more than their bytes: their number is bounded too.
        if self.bytes > BODY_COPY || frames.len() >= 1024 {
            self.frames = None;
        } else {
            frames.push_back(piece);
        }
    }
}

/// A response's body on its way back.
pub struct ResponseBody {
    kind: Kind,
    /// Its first frame, where somebody had to look at it before.
    ahead: Option<Ahead>,
    /// Reports when it is dropped, so whatever ends this body ends the exchange. Boxed: hyper keeps room for a body as long
    /// as the connection is open.
    exchange: Option<Box<Exchange>>,
    /// What the connection goes back to its pool with.
    checkout: Option<Checkout>,
    /// The endpoint hears what became of it.
    lease: Option<Lease>,
    deadline: Option<(Deadline, Pin<Box<Sleep>>)>,
    /// Looks whether it moves, where a route wants it to.
    idle: Option<Box<Idle>>,
    /// Whoever reads this has taken what came, and waits for more.
    waits: bool,
    /// The request's turn on its connection ends with its response.
    turn: Option<Turn>,
}

/// What a body says when it is asked for more.
pub(crate) type Polled = Poll<Option<Result<Frame<Bytes>, BodyError>>>;

/// A frame that came early.
pub(crate) type Ahead = Box<Result<Frame<Bytes>, hyper::Error>>;

enum Kind {
    Empty,
    Text(Option<Bytes>),
    Incoming(Incoming),
    /// One that is with whoever looks after the app's room.
    Watched(Watched),
    /// It broke off, which the caller hears after what came before.
    Broken(BodyError),
}

impl ResponseBody {
    /// No body.
    pub fn empty() -> Self {
        Self::of(Kind::Empty)
    }

    /// A short text of this proxy's own.
    pub fn text(text: String) -> Self {
        Self::of(Kind::Text(Some(text.into())))
    }

    /// An endpoint's body, of which something may have come already, and of which `lease` has yet to hear the end.
    pub(crate) fn of_endpoint(
        body: Incoming,
        ahead: Option<Ahead>,
        checkout: Checkout,
        lease: Option<Lease>,
        deadline: Option<Deadline>,
    ) -> Self {
        let deadline = deadline.map(|deadline| (deadline, Box::pin(tokio::time::sleep_until(deadline.at()))));
        let mut this = Self::of(Kind::Incoming(body));
        (this.ahead, this.checkout, this.lease, this.deadline) = (ahead, Some(checkout), lease, deadline);
        this
    }

    #[cfg(test)]
    pub(crate) fn of_anybody(body: Incoming) -> Self {
        Self::of(Kind::Incoming(body))
    }

    fn of(kind: Kind) -> Self {
        Self {
            kind,
            ahead: None,
            exchange: None,
            checkout: None,
            lease: None,
            deadline: None,
            idle: None,
            waits: false,
            turn: None,
        }
    }

    /// Lets `exchange` end with this body, or before, where others wait for its room at the app.
    pub fn reporting(mut self, exchange: Box<Exchange>) -> Self {
        let stay = exchange.stay().cloned();
        self.exchange = Some(exchange);
        match stay {
            Some(stay) => Self::of(Kind::Watched(Watched::new(self, stay))),
            None => self,
        }
    }

    /// Breaks off once nothing moves any more.
    pub(crate) fn unless(mut self, idle: Option<Box<Idle>>) -> Self {
        self.idle = idle;
        self
    }

    /// Holds the request's turn on its connection until this body has ended.
    pub(crate) fn taking(mut self, turn: Turn) -> Self {
        self.turn = Some(turn);
        self
    }

    /// At an error hyper and h2 drop what they have not sent yet, the head too: they send it first.
    fn after_what_came_before<T>(&self, cx: &Context<'_>) -> Poll<T> {
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    /// Its deadline has passed.
    #[cold]
    fn expire(&mut self, deadline: Deadline, cx: &Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let status = deadline.is_grpc().then(|| Error::Deadline(deadline.set_by()).grpc_status());
        self.over(BodyError::Deadline(deadline), status, cx)
    }

    /// A timer has ended it. A call ends as gRPC ends calls: with a status.
    #[cold]
    fn over(
        &mut self,
        error: BodyError,
        status: Option<HeaderMap>,
        cx: &Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        (self.deadline, self.idle) = (None, None);
        self.fail(&error);
        match status {
            Some(status) => {
                self.kind = Kind::Empty;
                Poll::Ready(Some(Ok(Frame::trailers(status))))
            }
            None => {
                self.kind = Kind::Broken(error);
                self.after_what_came_before(cx)
            }
        }
    }

    fn finish(&mut self) {
        if let Some(mut lease) = self.lease.take() {
            lease.complete();
        }
        if let Some(exchange) = &mut self.exchange {
            exchange.complete();
        }
        self.exchange = None;
        if let Some(checkout) = self.checkout.take() {
            checkout.give_back();
        }
    }

    pub(crate) fn fail(&mut self, error: &BodyError) {
        if let Some(mut exchange) = self.exchange.take() {
            exchange.body_failed(error);
        }
        self.checkout = None;
        let Some(mut lease) = self.lease.take() else { return };
        match error {
            BodyError::Hyper(error) => lease.broke_off(error),
            BodyError::Deadline(_) if self.waits => lease.expired(),
            BodyError::Idle { .. } => lease.too_slow(),
            // Whoever reads it took too long.
            BodyError::Deadline(_) | BodyError::Unread(_) | BodyError::Superseded => {}
        }
    }
}

impl Body for ResponseBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let this = &mut *self;
        if let Some((deadline, passed)) = &mut this.deadline
            && passed.as_mut().poll(cx).is_ready()
        {
            let deadline = *deadline;
            return this.expire(deadline, cx);
        }
        if matches!(this.kind, Kind::Broken(_))
            && let Kind::Broken(error) = std::mem::replace(&mut this.kind, Kind::Empty)
        {
            return Poll::Ready(Some(Err(error)));
        }
        let frame = match &mut this.kind {
            Kind::Incoming(_) if this.ahead.is_some() => this.ahead.take().map(|frame| *frame),
            Kind::Empty | Kind::Broken(_) => None,
            Kind::Text(text) => text.take().map(|text| Ok(Frame::data(text))),
            Kind::Watched(watched) => match watched.poll_frame(cx) {
                Ok(polled) => return polled,
                Err(over) => {
                    this.kind = Kind::Broken(over);
                    return this.after_what_came_before(cx);
                }
            },
            Kind::Incoming(body) => match poll_useful_frame(body, cx) {
                Poll::Ready(frame) => {
                    this.waits &= !matches!(frame, Some(Ok(_)));
                    frame
                }
                Poll::Pending => {
                    let waited = std::mem::replace(&mut this.waits, true);
                    let Some(idle) = &mut this.idle else { return Poll::Pending };
                    if !waited {
                        // The head, or what came before, has been taken just now.
                        idle.moved();
                    }
                    ready!(idle.poll(cx));
                    let (time, grpc) = (idle.time(), idle.is_grpc());
                    let status = grpc.then(|| Error::Idle(time).grpc_status());
                    return this.over(BodyError::Idle { time, grpc }, status, cx);
                }
            },
        };
        match frame {
            None => {
                this.finish();
                Poll::Ready(None)
            }
            Some(Ok(frame)) => {
                let grpc_status = frame.trailers_ref().and_then(grpc_status);
                if let Some(lease) = &mut this.lease {
                    lease.moved();
                    if let Some(status) = grpc_status {
                        lease.ended(status);
                    }
                }
                if let Some(exchange) = &mut this.exchange {
                    if let Some(data) = frame.data_ref() {
                        exchange.response_bytes += data.len() as u64;
                    }
                    exchange.grpc_status = grpc_status.or(exchange.grpc_status);
                }
                Poll::Ready(Some(Ok(frame)))
            }
            Some(Err(error)) => {
                // Its proxy was told of the same deadline, and saw it pass a moment sooner.
                if let Some((deadline, _)) = this.deadline.as_ref().filter(|(deadline, _)| deadline.is_near()) {
                    let deadline = *deadline;
                    return this.expire(deadline, cx);
                }
                let error = BodyError::Hyper(error);
                this.fail(&error);
                this.kind = Kind::Broken(error);
                self.after_what_came_before(cx)
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        match &self.kind {
            Kind::Empty => true,
            Kind::Text(text) => text.is_none(),
            Kind::Incoming(body) => self.ahead.is_none() && body.is_end_stream(),
            Kind::Watched(watched) => watched.with(Self::is_end_stream).unwrap_or(false),
            Kind::Broken(_) => false,
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.kind {
            Kind::Empty => SizeHint::with_exact(0),
            Kind::Text(text) => SizeHint::with_exact(text.as_ref().map_or(0, |text| text.len() as u64)),
            Kind::Incoming(_) if self.ahead.is_some() => SizeHint::default(),
            Kind::Incoming(body) => body.size_hint(),
            Kind::Watched(watched) => watched.with(Self::size_hint).unwrap_or_default(),
            Kind::Broken(_) => SizeHint::default(),
        }
    }
}

impl Drop for ResponseBody {
    /// hyper drops a body that is known to have ended without asking it for its last frame.
    fn drop(&mut self) {
        if self.is_end_stream() {
            self.finish();
        }
    }
}
