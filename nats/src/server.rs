//! The worker's side: its one subscription, read in order, and what follows from each message.
//!
//! The loop never waits for work: calls and questions run as tasks of their own, and what it decides is
//! decided by [`Desk`], which is driven here with real time.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use async_nats::{Message, Subject, Subscriber};
use bytes::Bytes;
use futures_util::StreamExt;
use mcp_shared::{
    error::{ErrorCode, WorkerError},
    hosting::{Hosting, Refusal},
    json::RawJson,
};
use tokio::{
    sync::{Notify, Semaphore, oneshot},
    time::{Instant, MissedTickBehavior, interval},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    bus::Bus,
    callee::{Desk, Freshness, GivenUp, OnGo, OnOffer, Reply},
    caller::{Now, no_worker},
    connect::OpenError,
    frames::{Assembled, Assembly},
    router::Router,
    wire::{self, CallId, Frame, Offer, ToRouter, ToWorker},
};

mod calls;
mod drain;
pub(crate) mod front_door;
mod placement;
mod questions;

/// How often a worker sends itself a pulse.
const PULSE: Duration = Duration::from_millis(250);
/// Questions that it works on at once.
const OPEN_QUESTIONS: usize = 1_024;
/// Kibibytes of large arguments that may be on their way to one worker.
const BODIES_KIB: usize = 48 * 1024;
/// How often everything is read again although nothing seems to have been missed.
const REREAD: Duration = Duration::from_secs(30);
/// How often that is done while a part of the fleet may be out of reach.
const REREAD_SPLIT: Duration = Duration::from_secs(2);
/// The pause after what is stored could not be read.
const UNREADABLE: Duration = Duration::from_millis(500);
/// How long a new worker listens to changes before it reads what is stored: a change that was made
/// before others knew of it is read then.
const LISTENING: Duration = Duration::from_millis(300);

/// A worker on the bus.
pub struct Server {
    inner: Arc<Inner>,
}

struct Inner {
    bus: Bus,
    host: Arc<dyn Hosting>,
    router: Router,
    desk: Mutex<Table>,
    questions: Mutex<HashMap<CallId, Arc<Semaphore>>>,
    /// Large answers on their way, with what their readers let come.
    sending: Mutex<HashMap<CallId, Arc<Semaphore>>>,
    /// How often something may have been missed.
    missed: AtomicU64,
    /// How much of it has been made up for: everything was read after it. While that is not all, nothing
    /// may be started.
    made_up: AtomicU64,
    /// [`Bus::gaps`], as far as they were noticed.
    gaps: AtomicU64,
    resync: Notify,
    bodies: Arc<Semaphore>,
    tasks: TaskTracker,
    stopping: CancellationToken,
    /// A call is over.
    ended: Notify,
}

/// The desk, and what belongs to the calls on it.
#[derive(Default)]
struct Table {
    desk: Desk,
    fresh: Freshness,
    live: HashMap<CallId, Live>,
}

/// A call that is not over.
struct Live {
    limit: Duration,
    cancelled: CancellationToken,
    arguments: Option<oneshot::Sender<RawJson>>,
    assembly: Assembly,
    size: usize,
    repeatable: bool,
}

impl Server {
    /// Begins to serve: subscribes, lets the fleet know, reads what is stored, and takes calls from then
    /// on. `router` is this worker's own way to the fleet.
    pub async fn start(bus: Bus, host: Arc<dyn Hosting>, router: Router) -> Result<Self, OpenError> {
        let subscriber = bus.client().subscribe(bus.subjects().worker_all(bus.node())).await?;
        let inner = Arc::new(Inner {
            desk: Mutex::default(),
            questions: Mutex::default(),
            sending: Mutex::default(),
            missed: AtomicU64::new(1),
            made_up: AtomicU64::new(0),
            gaps: AtomicU64::new(bus.gaps()),
            resync: Notify::new(),
            bodies: Arc::new(Semaphore::new(BODIES_KIB)),
            tasks: TaskTracker::new(),
            stopping: CancellationToken::new(),
            ended: Notify::new(),
            bus,
            host,
            router,
        });
        inner.tasks.spawn(Arc::clone(&inner).listen(subscriber));
        inner.tasks.spawn(Arc::clone(&inner).pulse());
        inner.tasks.spawn(Arc::clone(&inner).keep_in_sync());
        inner.tasks.spawn(Arc::clone(&inner).place());
        front_door::open(&inner).await;
        Ok(Self { inner })
    }

    /// Whether calls are taken.
    pub fn is_ready(&self) -> bool {
        self.inner.router.is_up() && !self.inner.is_stale()
    }

    /// Takes nothing new, sees to it that others own what this worker owns, and waits for the calls in
    /// flight; all of it within `limit`.
    pub async fn drain(&self, limit: Duration) {
        self.inner.drain(limit).await;
    }

    /// Ends every task.
    pub async fn stop(&self) {
        self.inner.stopping.cancel();
        self.inner.tasks.close();
        let _ = tokio::time::timeout(Duration::from_secs(1), self.inner.tasks.wait()).await;
    }
}

impl Inner {
    fn table(&self) -> MutexGuard<'_, Table> {
        self.desk.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether what is read now is young, and everything older was taken in.
    fn is_fresh(&self, table: &Table, now: Now) -> bool {
        let gaps = self.bus.gaps();
        if self.gaps.swap(gaps, Ordering::AcqRel) != gaps {
            self.lose_sync();
        }
        let fresh = table.fresh.is_fresh(now);
        if !fresh {
            self.lose_sync();
        }
        fresh && !self.is_stale()
    }

    /// Whether something may have been missed that was not read since.
    pub(super) fn is_stale(&self) -> bool {
        self.missed.load(Ordering::Acquire) != self.made_up.load(Ordering::Acquire)
    }

    /// Something may have been missed.
    fn lose_sync(&self) {
        let was_stale = self.is_stale();
        self.missed.fetch_add(1, Ordering::AcqRel);
        if !was_stale {
            tracing::warn!("this worker may have missed changes: it takes no calls until it has read them");
        }
        self.resync.notify_one();
    }

    async fn listen(self: Arc<Self>, mut messages: Subscriber) {
        loop {
            let message = tokio::select! {
                message = messages.next() => message,
                () = self.stopping.cancelled() => return,
            };
            match message {
                Some(message) => self.message(message).await,
                None => return,
            }
        }
    }

    async fn message(self: &Arc<Self>, message: Message) {
        let ((id, told), body) = match wire::decode::<(CallId, ToWorker)>(&message.payload) {
            Ok(read) => read,
            Err(error) => {
                tracing::warn!(%error, "a message was passed over");
                return;
            }
        };
        let now = self.bus.now();
        match told {
            ToWorker::Pulse { at_ms } => self.table().fresh.pulse(Duration::from_millis(at_ms)),
            ToWorker::Offer(offer) => {
                if let Some(reply) = message.reply {
                    self.offer(now, id, offer, reply).await;
                }
            }
            ToWorker::Go(frame) => self.go(now, id, frame, body, message.reply).await,
            ToWorker::Cancel => {
                let mut table = self.table();
                let given_up = table.desk.cancel(now, id);
                self.give_up(&mut table, id, given_up);
            }
            ToWorker::Credit(frames) => self.credit(id, frames),
            ToWorker::Probe { router, open, done } => {
                let replies = self.table().desk.probe(now, &router, &open, &done);
                if let Some(reply) = message.reply {
                    self.say(&reply, &ToRouter::Alive).await;
                }
                for (call, reply) in replies {
                    self.say_again(&router, call, reply).await;
                }
            }
            ToWorker::Ask(ask) => {
                if let Some(reply) = message.reply {
                    self.question(id, ask, reply).await;
                }
            }
        }
    }

    async fn offer(self: &Arc<Self>, now: Now, id: CallId, offer: Offer, reply: Subject) {
        let decided = {
            let mut table = self.table();
            let fresh = self.is_fresh(&table, now);
            if !(wire::VERSIONS.0..=wire::VERSIONS.1 + 1).contains(&offer.version) {
                Err(Refusal::Busy { error: no_worker() })
            } else if !table.desk.knows(id)
                && let Err(error) = self.host.room()
            {
                // Others may have room. Nothing is kept of what is refused here.
                Err(Refusal::Busy { error })
            } else {
                match table.desk.offer(now, fresh, id, &offer.router) {
                    OnOffer::Admit => {
                        let (arguments, go) = oneshot::channel();
                        let cancelled = CancellationToken::new();
                        let live = Live {
                            limit: calls::longest(&offer),
                            cancelled: cancelled.clone(),
                            arguments: Some(arguments),
                            assembly: Assembly::default(),
                            size: offer.size,
                            repeatable: false,
                        };
                        table.live.insert(id, live);
                        Ok(Some((go, cancelled)))
                    }
                    OnOffer::Say(Reply::Refuse) => Err(Refusal::Busy { error: no_worker() }),
                    // The first answer is under way.
                    OnOffer::Say(_) | OnOffer::Ignore => Ok(None),
                }
            }
        };
        match decided {
            Ok(Some((go, cancelled))) => {
                let call = calls::Admission { id, offer, reply, go, cancelled };
                self.tasks.spawn(Arc::clone(self).admit(call));
            }
            Ok(None) => {}
            Err(refusal) => self.say(&reply, &ToRouter::Refuse(refusal)).await,
        }
    }

    async fn go(self: &Arc<Self>, now: Now, id: CallId, frame: Frame, part: Bytes, reply: Option<Subject>) {
        let refusal = {
            let mut table = self.table();
            let fresh = self.is_fresh(&table, now);
            let table = &mut *table;
            match table.desk.go(now, fresh, id) {
                OnGo::Ignore => None,
                OnGo::Take => {
                    let Some(live) = table.live.get_mut(&id) else { return };
                    match live.assembly.take(&frame, part, live.size) {
                        Assembled::Partly => None,
                        Assembled::Whole(arguments) => {
                            if table.desk.start(id)
                                && let Some(sender) = live.arguments.take()
                            {
                                let _ = sender.send(RawJson::from_parsed(arguments));
                            }
                            None
                        }
                        Assembled::Broken | Assembled::TooLarge => {
                            table.desk.refused(id);
                            self.give_up(table, id, GivenUp::Place);
                            Some(Reply::Refuse)
                        }
                    }
                }
                OnGo::Say(again) => {
                    if again == Reply::Refuse {
                        self.give_up(table, id, GivenUp::Place);
                    }
                    Some(again)
                }
            }
        };
        if let (Some(again), Some(reply)) = (refusal, reply) {
            self.say_reply(id, &reply, again).await;
        }
    }

    fn credit(&self, id: CallId, frames: u32) {
        let frames = usize::try_from(frames.min(1_024)).unwrap_or(1);
        let credit = lock(&self.sending).get(&id).cloned();
        if let Some(credit) = credit.or_else(|| lock(&self.questions).get(&id).cloned()) {
            credit.add_permits(frames);
        }
    }

    fn give_up(&self, table: &mut Table, id: CallId, given_up: GivenUp) {
        if given_up != GivenUp::Nothing
            && let Some(live) = table.live.remove(&id)
        {
            live.cancelled.cancel();
            self.ended.notify_waiters();
        }
    }

    /// Repeats what stands about a call, to the router's inbox.
    async fn say_again(self: &Arc<Self>, router: &mcp_shared::ids::WorkerId, call: CallId, reply: Reply) {
        let inbox = format!("{}.{call}", self.bus.subjects().inbox(router));
        let live = self.table().live.get(&call).map(|live| (live.limit, live.repeatable));
        let (limit_ms, repeatable) =
            live.map_or((0, false), |(limit, repeats)| (wire::millis(limit), repeats));
        match reply {
            Reply::Wait if limit_ms > 0 => self.say(&inbox.into(), &ToRouter::Wait { limit_ms }).await,
            Reply::Accept if limit_ms > 0 => {
                self.say(&inbox.into(), &ToRouter::Accept { limit_ms, repeatable }).await
            }
            Reply::Wait | Reply::Accept => {}
            other => self.say_reply(call, &inbox.into(), other).await,
        }
    }

    async fn say_reply(self: &Arc<Self>, id: CallId, to: &Subject, reply: Reply) {
        match reply {
            Reply::Refuse => {
                self.say(to, &ToRouter::Refuse(Refusal::Busy { error: no_worker() })).await;
            }
            Reply::End(ending) => {
                let (inner, to) = (Arc::clone(self), to.clone());
                self.tasks.spawn(async move { inner.end(id, &to, ending).await });
            }
            Reply::Forgotten => {
                let text = "The call ran, and its answer is not kept any more";
                let error = WorkerError::new(ErrorCode::WorkerLost, text)
                    .outcome(mcp_shared::error::Outcome::Unknown);
                self.say(to, &ToRouter::Failed(error)).await;
            }
            Reply::Wait | Reply::Accept => {}
        }
    }

    async fn say(&self, to: &Subject, message: &ToRouter) {
        self.say_with(to, message, &[]).await;
    }

    async fn say_with(&self, to: &Subject, message: &ToRouter, body: &[u8]) {
        let sent = match wire::encode(message, body) {
            Ok(payload) => self.bus.publish(to.clone(), payload).await,
            Err(error) => Err(error.into()),
        };
        if let Err(error) = sent {
            tracing::warn!(error.cause = %error, "an answer was not sent");
        }
    }

    /// Sends pulses, and looks at the clock.
    async fn pulse(self: Arc<Self>) {
        let mut ticks = interval(PULSE / 2);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut even = false;
        loop {
            tokio::select! {
                _ = ticks.tick() => {}
                () = self.stopping.cancelled() => return,
            }
            even = !even;
            if even && self.bus.is_connected() {
                let at_ms = wire::millis(self.bus.now());
                let subject = self.bus.subjects().worker(self.bus.node(), "pulse");
                let pulse = (CallId(0), ToWorker::Pulse { at_ms });
                let _ = self.bus.send(subject, &pulse, &[]).await;
            }
            let now = self.bus.now();
            let mut table = self.table();
            let fresh = self.is_fresh(&table, now);
            for (id, given_up) in table.desk.tick(now, fresh) {
                self.give_up(&mut table, id, given_up);
            }
        }
    }

    /// Reads everything again whenever something may have been missed, and only then lets calls in.
    async fn keep_in_sync(self: Arc<Self>) {
        tokio::time::sleep(LISTENING).await;
        self.resync.notify_one();
        let mut read = Instant::now();
        let mut was_split = false;
        loop {
            tokio::select! {
                () = self.resync.notified() => {}
                // A change that was stored by somebody who died before telling of it is found like this, and one
                // by somebody whom this worker cannot hear since NATS servers lost each other.
                () = tokio::time::sleep(REREAD_SPLIT) => {
                    let split = self.router.may_be_split();
                    // Once more when it is over: the last moments of it are read as well.
                    if read.elapsed() >= REREAD || split || was_split {
                        if let Err(error) = self.host.resync(false).await {
                            tracing::warn!(%error, "what is stored cannot be read");
                        }
                        read = Instant::now();
                    }
                    was_split = split;
                }
                () = self.stopping.cancelled() => return,
            }
            while self.is_stale() && !self.stopping.is_cancelled() {
                // What is missed while everything is read counts as missed again.
                let missed = self.missed.load(Ordering::Acquire);
                let (gaps, young) = (self.bus.gaps(), self.table().fresh.is_fresh(self.bus.now()));
                // What is read before the connection is good may be old when it is.
                if young && self.bus.is_connected() {
                    // Others have to know of this worker before it reads: they tell it what comes later.
                    self.router.show_up().await;
                    match self.host.resync(true).await {
                        Ok(()) if self.bus.gaps() == gaps && self.table().fresh.is_fresh(self.bus.now()) => {
                            self.made_up.store(missed, Ordering::Release);
                            if !self.is_stale() {
                                tracing::info!("in step with the fleet");
                                continue;
                            }
                        }
                        Ok(()) => {}
                        Err(error) => {
                            tracing::warn!(%error, "what is stored cannot be read");
                            tokio::time::sleep(UNREADABLE).await;
                        }
                    }
                }
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
