//! Calls on their way: what the state machine says is done here.

use std::sync::{Arc, Mutex};

use bytes::Bytes;
use mcp_shared::{
    error::{ErrorCode, Outcome, WorkerError},
    hosting::Refusal,
    ids::{ServerName, UserId, WorkerId},
    json::RawJson,
    limits,
    metrics::{self, Limit},
    worker_api::{CallContext, CallEvent, ToolCall},
};
use tokio::sync::{
    OwnedSemaphorePermit,
    mpsc::{self, error::TrySendError},
    oneshot,
};

use super::{BODIES_KIB, Inner, lock, posts::Post};
use crate::{
    caller::{Caller, Now, Said, Step, Turn, no_worker},
    fleet::{Choice, Underway},
    frames::{Assembled, Assembly, FRAME_BYTES},
    wire::{CallId, Frame, ToRouter},
};

/// Bytes that an answer may have: a result, and what its line has around it.
const ANSWER_BYTES: usize = limits::RESULT_BYTES + 1024;
/// How long a server counts as being started somewhere else as well.
const EXPANSION: Now = Now::from_secs(3);
/// How long calls may still take when their router stops.
const LAST_MOMENT: Now = Now::from_millis(900);
/// How long it is left alone after that was refused.
const NO_EXPANSION: Now = Now::from_secs(30);

/// Whether a call that ended so was not started, and another worker may take it.
fn may_go_elsewhere(error: &WorkerError) -> bool {
    error.outcome == Some(Outcome::NotStarted)
        && matches!(error.code, ErrorCode::NoWorker | ErrorCode::Overloaded | ErrorCode::ShuttingDown)
}

/// One call of this router.
pub(super) struct Call {
    first: CallId,
    pub(super) context: CallContext,
    pub(super) request: ToolCall,
    state: Mutex<State>,
}

struct State {
    caller: Caller,
    /// The attempt that stands in the router's list.
    listed: Option<CallId>,
    underway: Option<Underway>,
    expands: bool,
    /// When something was heard about it.
    heard: Now,
    assembly: Assembly,
    /// Room for a large answer.
    room: Option<OwnedSemaphorePermit>,
    room_asked: bool,
    /// Gone with the end of the call, so that its reader sees that nothing follows.
    events: Option<mpsc::Sender<CallEvent>>,
    /// The end has its place in the queue from the start.
    end: Option<mpsc::OwnedPermit<CallEvent>>,
    admitted: Option<oneshot::Sender<Result<(), WorkerError>>>,
}

/// Cancels a call when its caller is gone.
pub(super) struct Guard {
    inner: Arc<Inner>,
    call: Arc<Call>,
    reports_admission: bool,
}

impl Guard {
    pub(super) fn reports_admission(&self) -> bool {
        self.reports_admission
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        let mut post = Vec::new();
        {
            let mut state = lock(&self.call.state);
            if !state.caller.is_ended() {
                let turn = state.caller.cancel();
                self.inner.apply(&self.call, &mut state, turn, &mut post);
            }
        }
        if !post.is_empty() {
            let inner = Arc::clone(&self.inner);
            let call = Arc::clone(&self.call);
            self.inner.tasks.spawn_on(async move { inner.post(&call, post).await }, &self.inner.runtime);
        }
    }
}

impl Inner {
    /// Takes in a new call and offers it.
    pub(super) async fn begin(
        self: &Arc<Self>,
        context: CallContext,
        request: ToolCall,
        events: mpsc::Sender<CallEvent>,
        admitted: Option<oneshot::Sender<Result<(), WorkerError>>>,
    ) -> Result<Guard, WorkerError> {
        let now = self.bus.now();
        // A call that has a name may have been made before, and then needs no room.
        if self.crowds.any()
            && request.idempotency.is_none()
            && let Some(told) = self.crowds.told(now, &self.crowd(&request, &context, now))
        {
            metrics::count_refusal(Limit::Crowd);
            return Err(told);
        }
        let end = events
            .clone()
            .try_reserve_owned()
            .map_err(|_| WorkerError::internal("a new channel is full").outcome(Outcome::NotStarted))?;
        let reports_admission = admitted.is_some();
        let call = Arc::new(Call {
            first: self.ids.next(),
            state: Mutex::new(State {
                caller: Caller::new(now, context.timeout),
                listed: None,
                underway: None,
                expands: false,
                heard: now,
                assembly: Assembly::default(),
                room: None,
                room_asked: false,
                events: Some(events),
                end: Some(end),
                admitted,
            }),
            context,
            request,
        });
        lock(&self.open).insert(call.first, Arc::clone(&call));
        let guard = Guard { inner: Arc::clone(self), call: Arc::clone(&call), reports_admission };
        self.advance(&call, |_| Some(Turn { withdraw: None, step: Step::Choose })).await;
        Ok(guard)
    }

    /// Moves a call on, and sends what follows from it.
    async fn advance(self: &Arc<Self>, call: &Arc<Call>, with: impl FnOnce(&mut State) -> Option<Turn>) {
        let post = self.turn(call, with);
        self.post(call, post).await;
    }

    /// Moves a call on without waiting for what follows to be sent.
    fn nudge(self: &Arc<Self>, call: &Arc<Call>, with: impl FnOnce(&mut State) -> Option<Turn>) {
        let post = self.turn(call, with);
        if !post.is_empty() {
            let (inner, call) = (Arc::clone(self), Arc::clone(call));
            self.send_later(async move { inner.post(&call, post).await });
        }
    }

    /// Moves a call on. Returned is what has to be sent.
    fn turn(self: &Arc<Self>, call: &Arc<Call>, with: impl FnOnce(&mut State) -> Option<Turn>) -> Vec<Post> {
        let mut post = Vec::new();
        let mut state = lock(&call.state);
        if let Some(turn) = with(&mut state) {
            self.apply(call, &mut state, turn, &mut post);
        }
        post
    }

    /// Does what the state machine said, short of sending.
    fn apply(self: &Arc<Self>, call: &Arc<Call>, state: &mut State, mut turn: Turn, post: &mut Vec<Post>) {
        loop {
            if let Some((worker, attempt)) = turn.withdraw.take() {
                self.cancelled.note(self.bus.now(), &worker, attempt);
                post.push(Post::Cancel { worker, attempt });
            }
            match std::mem::replace(&mut turn.step, Step::Stay) {
                Step::Stay => break,
                Step::Choose => {
                    self.unlist(state);
                    let now = self.bus.now();
                    let Some(choice) = self.choose(call, state, now) else {
                        turn = state.caller.nobody(now, no_worker());
                        continue;
                    };
                    let attempt = self.ids.next();
                    state.caller.chosen(now, choice.worker.clone(), attempt);
                    state.listed = Some(attempt);
                    state.underway = choice.underway;
                    state.expands = choice.expands;
                    state.heard = now;
                    state.assembly = Assembly::default();
                    (state.room, state.room_asked) = (None, false);
                    lock(&self.attempts).insert(attempt, Arc::clone(call));
                    let spent = state.caller.spent(now);
                    post.push(Post::Offer { worker: choice.worker, attempt, placing: choice.placing, spent });
                }
                Step::Go(worker, attempt) => {
                    if let Some(admitted) = state.admitted.take() {
                        let _ = admitted.send(Ok(()));
                    }
                    post.push(Post::Go { worker, attempt });
                }
                Step::End(error) => {
                    if error.code == ErrorCode::Overloaded {
                        let now = self.bus.now();
                        self.crowds.note(now, self.crowd(&call.request, &call.context, now), &error);
                    }
                    // Whoever calls with progress learns of a refusal before the stream begins.
                    match state.admitted.take() {
                        Some(admitted) => {
                            let _ = admitted.send(Err(*error));
                            state.end = None;
                        }
                        None => {
                            if let Some(end) = state.end.take() {
                                end.send(CallEvent::Done(Err(*error)));
                            }
                        }
                    }
                }
            }
        }
        if state.caller.attempt() != state.listed {
            self.unlist(state);
        }
        if state.caller.is_ended() {
            state.room = None;
            state.events = None;
            state.end = None;
            lock(&self.open).remove(&call.first);
        }
    }

    fn unlist(&self, state: &mut State) {
        if let Some(attempt) = state.listed.take() {
            lock(&self.attempts).remove(&attempt);
        }
        state.underway = None;
    }

    /// With whom a call would wait.
    fn crowd(&self, request: &ToolCall, context: &CallContext, now: Now) -> (ServerName, Option<UserId>) {
        let own = self.fleet().is_per_user(now, &request.server);
        (request.server.clone(), own.then(|| context.user.clone()))
    }

    fn choose(&self, call: &Call, state: &State, now: Now) -> Option<Choice> {
        let (server, user, wish) = (&call.request.server, &call.context.user, state.caller.wish());
        let fleet = self.fleet();
        let choice = fleet.choose(now, server, user, wish, |end| self.draw(end))?;
        if !choice.expands {
            return Some(choice);
        }
        let mut expanding = lock(&self.expanding);
        expanding.retain(|_, until| *until > now);
        if expanding.contains_key(server)
            && let Some(owner) = fleet.choose_owner(now, server, wish)
        {
            return Some(owner);
        }
        expanding.insert(server.clone(), now + EXPANSION);
        Some(choice)
    }

    /// A worker answered about an attempt.
    pub(super) async fn answered(self: &Arc<Self>, attempt: CallId, said: ToRouter, body: Bytes) {
        let Some(call) = lock(&self.attempts).get(&attempt).cloned() else { return };
        let now = self.bus.now();
        let mut post = Vec::new();
        {
            let mut state = lock(&call.state);
            let state = &mut *state;
            state.heard = now;
            let going = state.caller.is_going(attempt);
            let turn = match said {
                ToRouter::Wait { limit_ms } => {
                    if let Some(admitted) = state.admitted.take() {
                        let _ = admitted.send(Ok(()));
                    }
                    state.caller.said(now, attempt, Said::Wait { limit: Now::from_millis(limit_ms) })
                }
                ToRouter::Accept { limit_ms, repeatable } => {
                    let limit = Now::from_millis(limit_ms);
                    state.caller.said(now, attempt, Said::Accept { limit, repeatable })
                }
                ToRouter::Refuse(refusal) => {
                    if state.expands {
                        // It may run only once, or cannot run there.
                        let until = now + NO_EXPANSION;
                        lock(&self.expanding).insert(call.request.server.clone(), until);
                    }
                    // Where thousands are turned away, beats come late.
                    if let Some(worker) = state.caller.worker() {
                        self.fleet_mut().answered(now, worker);
                    }
                    state.caller.said(now, attempt, Said::Refuse(refusal))
                }
                ToRouter::Progress if going => {
                    // A reader who is slow misses some.
                    if let Some(events) = &state.events
                        && let Err(TrySendError::Full(_)) =
                            events.try_send(CallEvent::Progress(RawJson::from_parsed(body)))
                    {
                        metrics::count_dropped_progress();
                    }
                    return;
                }
                ToRouter::Replayed if going => {
                    if let Some(events) = &state.events {
                        let _ = events.try_send(CallEvent::Replayed);
                    }
                    return;
                }
                ToRouter::Answer(frame) if going => {
                    match self.assemble(&call, state, attempt, &frame, body, &mut post) {
                        Some(turn) => turn,
                        None => Turn { withdraw: None, step: Step::Stay },
                    }
                }
                // It lost its place between GO and the server, because its worker stops for example.
                ToRouter::Failed(error) if going && may_go_elsewhere(&error) => {
                    self.arrived(state, attempt);
                    state.caller.said(now, attempt, Said::Refuse(Refusal::Busy { error }))
                }
                ToRouter::Failed(error) if going => {
                    self.arrived(state, attempt);
                    let error = state.caller.honest(error);
                    let turn = state.caller.said(now, attempt, Said::Done);
                    if let Some(end) = state.end.take() {
                        end.send(CallEvent::Done(Err(error)));
                    }
                    turn
                }
                ToRouter::Progress
                | ToRouter::Replayed
                | ToRouter::Answer(_)
                | ToRouter::Failed(_)
                | ToRouter::Alive => return,
            };
            self.apply(&call, state, turn, &mut post);
        }
        self.post(&call, post).await;
    }

    /// Takes in a part of an answer.
    fn assemble(
        self: &Arc<Self>,
        call: &Arc<Call>,
        state: &mut State,
        attempt: CallId,
        frame: &Frame,
        part: Bytes,
        post: &mut Vec<Post>,
    ) -> Option<Turn> {
        let now = self.bus.now();
        match state.assembly.take(frame, part, ANSWER_BYTES) {
            Assembled::Whole(answer) => {
                self.arrived(state, attempt);
                let turn = state.caller.said(now, attempt, Said::Done);
                if let Some(end) = state.end.take() {
                    end.send(CallEvent::Done(Ok(RawJson::from_parsed(answer))));
                }
                Some(turn)
            }
            Assembled::TooLarge => {
                let text = "The answer of the server was too large";
                let error = WorkerError::new(ErrorCode::ResultTooLarge, text).outcome(Outcome::Completed);
                Some(state.caller.give_up(error))
            }
            // Nothing more is said until the watch asks for it again.
            Assembled::Broken => None,
            Assembled::Partly => {
                let frames = u32::try_from(frame.total.div_ceil(FRAME_BYTES)).unwrap_or(u32::MAX);
                let worker = state.caller.worker()?.clone();
                if state.room.is_some() {
                    // It is sent once more from the start, in a window of its own.
                    if frame.number == 0 {
                        post.push(Post::Credit { worker, attempt, frames });
                    }
                } else if !state.room_asked {
                    state.room_asked = true;
                    self.make_room(call, worker, attempt, frame.total, frames);
                }
                None
            }
        }
    }

    /// Lets the rest of a large answer come when there is room for it.
    fn make_room(
        self: &Arc<Self>,
        call: &Arc<Call>,
        worker: WorkerId,
        attempt: CallId,
        total: usize,
        frames: u32,
    ) {
        let (inner, call) = (Arc::clone(self), Arc::clone(call));
        self.tasks.spawn(async move {
            let kib = u32::try_from(total.div_ceil(1024).min(BODIES_KIB)).unwrap_or(u32::MAX);
            let room = tokio::select! {
                room = Arc::clone(&inner.bodies).acquire_many_owned(kib) => room,
                () = inner.stopping.cancelled() => return,
            };
            let Ok(room) = room else { return };
            {
                let mut state = lock(&call.state);
                if !state.caller.is_going(attempt) {
                    return;
                }
                state.room = Some(room);
            }
            inner.post(&call, vec![Post::Credit { worker, attempt, frames }]).await;
        });
    }

    /// An answer is here: the worker need not keep it.
    fn arrived(&self, state: &State, attempt: CallId) {
        if let Some(worker) = state.caller.worker() {
            let mut done = lock(&self.done);
            match done.get_mut(worker) {
                Some(ids) => ids.push(attempt),
                None => {
                    done.insert(worker.clone(), vec![attempt]);
                }
            }
        }
    }

    /// Nobody took a message about an attempt. A GO that nobody took started nothing.
    pub(super) async fn nobody_there(self: &Arc<Self>, attempt: CallId) {
        let Some(call) = lock(&self.attempts).get(&attempt).cloned() else { return };
        let now = self.bus.now();
        let mut lost = None;
        self.advance(&call, |state| {
            let worker = state.caller.worker()?.clone();
            let turn = if state.caller.is_going(attempt) {
                let refusal = Refusal::Busy { error: no_worker() };
                state.caller.said(now, attempt, Said::Refuse(refusal))
            } else {
                state.caller.lost(now, &worker)
            };
            lost = Some(worker);
            Some(turn)
        })
        .await;
        if let Some(worker) = lost {
            self.fleet_mut().silent(&worker);
        }
    }

    /// A worker is gone: every call that is with it moves on.
    pub(super) fn worker_lost(self: &Arc<Self>, worker: &WorkerId) {
        tracing::warn!(%worker, "a worker was lost");
        metrics::count_lost_worker();
        self.fleet_mut().silent(worker);
        let now = self.bus.now();
        for call in self.all_open() {
            self.nudge(&call, |state| Some(state.caller.lost(now, worker)));
        }
    }

    /// The bus was away for too long.
    pub(super) fn cut_off(self: &Arc<Self>) {
        for call in self.all_open() {
            self.nudge(&call, |state| Some(state.caller.cut_off()));
        }
    }

    /// This node stops: its calls have a last moment to end by themselves.
    pub(super) async fn end_calls(self: &Arc<Self>) {
        let end = tokio::time::Instant::now() + LAST_MOMENT;
        while !lock(&self.open).is_empty() && tokio::time::Instant::now() < end {
            tokio::time::sleep(Now::from_millis(10)).await;
        }
        for call in self.all_open() {
            let error =
                WorkerError::new(ErrorCode::ShuttingDown, "The gateway stopped before the call ended");
            self.advance(&call, |state| Some(state.caller.give_up(error))).await;
        }
    }

    /// Time goes by for every call. Returned is, for each worker that has some, which of its attempts
    /// have been silent for `silence`.
    pub(super) fn tick(self: &Arc<Self>, silence: Now) -> Vec<(WorkerId, Vec<CallId>)> {
        let (now, up) = (self.bus.now(), self.is_up());
        let mut silent: std::collections::HashMap<WorkerId, Vec<CallId>> = std::collections::HashMap::new();
        for call in self.all_open() {
            self.nudge(&call, |state| {
                if !up {
                    state.caller.without_bus(now);
                }
                Some(state.caller.tick(now))
            });
            let state = lock(&call.state);
            if let (Some(worker), Some(attempt)) = (state.caller.worker(), state.caller.attempt()) {
                let open = silent.entry(worker.clone()).or_default();
                // What waits for room here is not waited for there.
                let hindered = state.room_asked && state.room.is_none();
                if now.saturating_sub(state.heard) >= silence && !hindered {
                    open.push(attempt);
                }
            }
        }
        silent.into_iter().collect()
    }

    fn all_open(&self) -> Vec<Arc<Call>> {
        lock(&self.open).values().cloned().collect()
    }
}
