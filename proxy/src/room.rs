//! Room at the app: how many requests are with it at once, who waits for theirs, and who stands still for too long to keep
//! theirs. Decided in [`crate::traffic::shed`].

use std::pin::Pin;
use std::sync::atomic::{AtomicU8, AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body::Body;
use sheetbend_control_plane_client::model::Concurrency;
use slab::Slab;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};
use tokio::time::{sleep, timeout};

use crate::http::body::{BodyError, Passed, Polled, ResponseBody};
use crate::http::deadline::Deadline;
use crate::http::error::Error;
use crate::telemetry::{Counter, Telemetry};
use crate::traffic::limit::Slots;
use crate::traffic::shed::{self, Patience, Shed, Verdict, Wait};

/// How many requests may be with the app at once, and how many wait for that.
pub(crate) struct Gate {
    /// First come, first served.
    room: Arc<Semaphore>,
    most: Mutex<usize>,
    /// Room that is taken and will not be there any more once it is given back: the limit was lowered meanwhile.
    owed: AtomicUsize,
    pending: Slots,
    /// The start of the clock by which patience runs out.
    epoch: Instant,
    /// How long a stay may stand still: milliseconds, 0 is for ever.
    patience: AtomicU64,
    guests: Mutex<Guests>,
}

/// Who is with the app, and is looked after.
#[derive(Default)]
struct Guests {
    /// Nothing in the place of one who has given back its room and goes on.
    all: Slab<Option<(Arc<Stay>, Patience)>>,
    /// Somebody looks after them.
    looked_after: bool,
}

/// A place in the queue. Given up for the deadline's sake, it counts as that, however it came to be given up.
struct Place<'a> {
    gate: &'a Gate,
    telemetry: &'a Telemetry,
    deadline: Option<Deadline>,
    served: bool,
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.gate.pending.free();
        if !self.served && self.deadline.is_some_and(|deadline| deadline.left().is_zero()) {
            self.telemetry.count(Counter::ShedLate);
        }
    }
}

impl Gate {
    /// Without room yet.
    pub(crate) fn new() -> Self {
        Self {
            room: Arc::new(Semaphore::new(0)),
            most: Mutex::new(0),
            owed: AtomicUsize::new(0),
            pending: Slots::new(0),
            epoch: Instant::now(),
            patience: AtomicU64::new(0),
            guests: Mutex::default(),
        }
    }

    /// Keeps to another limit from now on. Whoever is with the app already stays.
    pub(crate) fn follow(&self, wanted: &Concurrency) {
        let wanted_most = usize::try_from(wanted.max_requests).unwrap_or(usize::MAX).min(Semaphore::MAX_PERMITS);
        self.pending.allow(wanted.max_pending.unwrap_or(0).into());
        self.patience.store(u64::try_from(wanted.stall_timeout().as_millis()).unwrap_or(u64::MAX), Relaxed);
        let mut most = lock(&self.most);
        if wanted_most > *most {
            let more = wanted_most - *most;
            let owed = self.owed.fetch_update(Relaxed, Relaxed, |owed| Some(owed.saturating_sub(more))).unwrap_or(0);
            self.room.add_permits(more - owed.min(more));
        } else {
            let fewer = *most - wanted_most;
            self.owed.fetch_add(fewer - self.room.forget_permits(fewer), Relaxed);
        }
        *most = wanted_most;
    }

    /// Room at the app, at once or after a wait. The caller of a gRPC call may be silent for as long as it likes.
    pub(crate) async fn enter(
        self: &Arc<Self>,
        pending_timeout: Duration,
        deadline: Option<Deadline>,
        grpc: bool,
        telemetry: &Arc<Telemetry>,
    ) -> Result<Room, Error> {
        // Free room means that nobody waits for it.
        if let Ok(permit) = Arc::clone(&self.room).try_acquire_owned() {
            return Ok(self.room(permit, grpc, telemetry));
        }
        let left = deadline.map(Deadline::left);
        let within = shed::queue(&self.pending, pending_timeout, left).map_err(Error::Shed)?;
        let mut place = Place { gate: self, telemetry, deadline, served: false };
        match timeout(within, Arc::clone(&self.room).acquire_owned()).await {
            Ok(Ok(permit)) => {
                place.served = true;
                Ok(self.room(permit, grpc, telemetry))
            }
            // It counts where the place is given up, or where the caller hears of it.
            Err(_) if deadline.is_some_and(|deadline| deadline.left().is_zero()) => {
                place.served = true;
                Err(Error::Shed(Shed::Late))
            }
            Ok(Err(_)) | Err(_) => Err(Error::Shed(Shed::Waited)),
        }
    }

    fn room(self: &Arc<Self>, permit: OwnedSemaphorePermit, grpc: bool, telemetry: &Arc<Telemetry>) -> Room {
        let stay = Arc::new(Stay {
            gate: Arc::clone(self),
            permit: Mutex::new(Some(permit)),
            grpc,
            request: OnceLock::new(),
            answer: Mutex::new(None),
            waits: AtomicU8::new(BEFORE_ITS_ANSWER),
            moved: AtomicU64::new(0),
            over: Notify::new(),
        });
        let mut guests = lock(&self.guests);
        let number = guests.all.insert(Some((Arc::clone(&stay), Patience::default())));
        if !std::mem::replace(&mut guests.looked_after, true) {
            tokio::spawn(Arc::clone(self).look_after(Arc::clone(telemetry)));
        }
        Room { stay, number }
    }

    fn patience(&self) -> Duration {
        match self.patience.load(Relaxed) {
            // No process runs for so long.
            0 => Duration::from_secs(u32::MAX.into()),
            millis => Duration::from_millis(millis),
        }
    }

    /// Looks after all who are with the app, until nobody is: one task for all of them, so that a request has no timer of its
    /// own.
    async fn look_after(self: Arc<Self>, telemetry: Arc<Telemetry>) {
        loop {
            let pause = (self.patience() / 16).clamp(Duration::from_millis(5), Duration::from_secs(5));
            sleep(pause).await;
            let Some(over) = self.look(2 * pause) else { return };
            // Nobody is sent away under the lock: whoever leaves takes it.
            for (stay, verdict) in over {
                stay.over(verdict, &telemetry);
            }
        }
    }

    /// Who has stood still for too long; `None` once nobody is there to look after.
    fn look(&self, seldom: Duration) -> Option<Vec<(Arc<Stay>, Verdict)>> {
        let (now, most) = (self.epoch.elapsed(), self.patience());
        let mut guests = lock(&self.guests);
        let mut over = Vec::new();
        let mut any = false;
        for (_, guest) in &mut guests.all {
            let Some((stay, patience)) = guest else { continue };
            any = true;
            let verdict = patience.look(stay.waits(), stay.moved(), now, seldom, most);
            if verdict != Verdict::Stays
                && let Some((stay, _)) = guest.take()
            {
                over.push((stay, verdict));
            }
        }
        guests.looked_after = any;
        any.then_some(over)
    }

    /// With the app now, and how many may be; waiting now, and how many may.
    pub(crate) fn levels(&self) -> [(u64, Option<u64>); 2] {
        let most = *lock(&self.most);
        let with_the_app = (most + self.owed.load(Relaxed)).saturating_sub(self.room.available_permits());
        [(with_the_app as u64, Some(most as u64)), (self.pending.taken(), self.pending.most())]
    }
}

/// Room at the app, until this is dropped, or taken back before.
pub(crate) struct Room {
    stay: Arc<Stay>,
    /// Among the guests.
    number: usize,
}

impl Room {
    /// Of whom it is.
    pub(crate) fn stay(&self) -> &Arc<Stay> {
        &self.stay
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        let guest = lock(&self.stay.gate.guests).all.try_remove(self.number);
        drop(guest);
        self.stay.give_back();
    }
}

const BEFORE_ITS_ANSWER: u8 = 0;
const QUIET: u8 = 1;
const UNREAD: u8 = 2;

/// A request that is with the app, as whoever looks after it sees it.
pub(crate) struct Stay {
    gate: Arc<Gate>,
    /// Until it is given back.
    permit: Mutex<Option<OwnedSemaphorePermit>>,
    grpc: bool,
    /// What passes of its body, where there is one.
    request: OnceLock<Arc<Passed>>,
    /// While it is on its way. Here, since hyper asks nothing of a body whose caller does not read: somebody else has to end
    /// it.
    answer: Mutex<Option<Box<ResponseBody>>>,
    waits: AtomicU8,
    /// Bytes of the answer, or of a tunnel.
    moved: AtomicU64,
    /// Rung for the request of a caller who kept the app waiting.
    over: Notify,
}

impl Stay {
    /// The request has a body, of which this is told.
    pub(crate) fn request(&self, passed: &Arc<Passed>) {
        // Once a request.
        let _ = self.request.set(Arc::clone(passed));
    }

    /// The request has become a tunnel, through which so many bytes have passed since the last word.
    pub(crate) fn tunnels(&self, bytes: u64) {
        self.waits.store(QUIET, Relaxed);
        self.moved.fetch_add(bytes, Relaxed);
    }

    /// How long it may stand still.
    pub(crate) fn patience(&self) -> Duration {
        self.gate.patience()
    }

    /// Waits for `call`, until its caller has kept the app waiting for too long.
    pub(crate) async fn unless_over<T>(
        &self,
        call: Pin<&mut impl Future<Output = Result<T, Error>>>,
    ) -> Result<T, Error> {
        tokio::select! {
            // The call first: an answer that is there is given.
            biased;
            done = call => done,
            () = self.over.notified() => Err(Error::Stalled(self.patience())),
        }
    }

    fn waits(&self) -> Wait {
        match (self.waits.load(Relaxed), self.request.get()) {
            (UNREAD, _) => Wait::Unread,
            (QUIET, _) => Wait::Quiet,
            (_, Some(request)) if request.is_waited_for() && self.grpc => Wait::Quiet,
            (_, Some(request)) if request.is_waited_for() => Wait::Request,
            _ => Wait::App,
        }
    }

    fn moved(&self) -> u64 {
        self.moved.load(Relaxed) + self.request.get().map_or(0, |request| request.bytes())
    }

    fn over(&self, verdict: Verdict, telemetry: &Telemetry) {
        // First: nobody waits for what follows.
        self.give_back();
        if verdict == Verdict::GivesBack {
            telemetry.count(Counter::StalledStream);
            return;
        }
        self.over.notify_one();
        let answer = lock(&self.answer).take();
        if let Some(mut answer) = answer {
            answer.fail(&BodyError::Unread(self.patience()));
        }
    }

    fn give_back(&self) {
        let Some(permit) = lock(&self.permit).take() else { return };
        if self.gate.owed.fetch_update(Relaxed, Relaxed, |owed| owed.checked_sub(1)).is_ok() {
            permit.forget();
        }
    }
}

/// An answer that can be ended while its caller does not read.
pub(crate) struct Watched(Arc<Stay>);

impl Watched {
    /// An answer to the request that stays.
    pub(crate) fn new(answer: ResponseBody, stay: Arc<Stay>) -> Self {
        stay.waits.store(UNREAD, Relaxed);
        *lock(&stay.answer) = Some(Box::new(answer));
        Self(stay)
    }

    /// `None` once it has been ended.
    pub(crate) fn with<T>(&self, look: impl FnOnce(&ResponseBody) -> T) -> Option<T> {
        lock(&self.0.answer).as_deref().map(look)
    }

    /// The next frame; why not, once it has been ended.
    pub(crate) fn poll_frame(&self, cx: &mut Context<'_>) -> Result<Polled, BodyError> {
        let mut answer = lock(&self.0.answer);
        let Some(body) = answer.as_deref_mut() else { return Err(BodyError::Unread(self.0.patience())) };
        let polled = Pin::new(body).poll_frame(cx);
        let data = match &polled {
            Poll::Ready(Some(Ok(frame))) => frame.data_ref().map_or(0, Bytes::len),
            Poll::Ready(_) | Poll::Pending => 0,
        };
        self.0.moved.fetch_add(data as u64, Relaxed);
        // What was taken is read once more is asked for.
        self.0.waits.store(if polled.is_ready() { UNREAD } else { QUIET }, Relaxed);
        Ok(polled)
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        // It holds what holds it; and whoever leaves takes the lock of the guests.
        let answer = lock(&self.0.answer).take();
        drop(answer);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
