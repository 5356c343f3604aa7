//! Everything that is stored, encrypted anew under the key that encrypts now: the last step but one of changing
//! keys. It goes on beside everything else: what users change meanwhile stays as they changed it, and it takes
//! only so much of the store in a second.
//!
//! Nothing needs to be remembered of how far it is. What is done does not need it any more, so that a run that
//! was cut short is resumed by another one, and two at once (which a lease prevents) would only be in each
//! other's way.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use serde::Serialize;
use tokio::time::{Instant, sleep, sleep_until};
use tokio_util::sync::CancellationToken;

use super::{
    Vault, VaultError,
    remote::what,
    texts::{Item, Kind, Walk, Written, drop_leftovers},
};
use crate::{
    crypter::{Crypter, CryptoErrorKind, LegacyMode, Place, is_legacy, is_sealed, kid_of},
    limits::{LEASE_RENEWAL, LEASE_TAKEOVER, REWRAP_NAMED},
    store::{Lease, StoreError},
    timestamp::Timestamp,
};

/// The lease of whoever is at it.
const LEASE: &str = "rewrap";
/// How often a holder's lease is looked at that may be lost.
const WATCH: Duration = Duration::from_millis(200);
/// Documents that need nothing are passed over in numbers like this, with a pause between.
const STRIDE: u64 = 256;
/// That pause.
const PAUSE: Duration = Duration::from_millis(5);

/// Why nothing was begun.
#[derive(Debug, thiserror::Error)]
pub enum RewrapError {
    /// Somebody else is at it.
    #[error("{owner} is rewrapping already")]
    Busy {
        /// Who.
        owner: String,
    },
    /// mcp-api still has to be able to read everything.
    #[error(
        "legacy mode rw: what is written stays in mcp-api's format; start every node with LEGACY_SECRETS=ro before"
    )]
    Legacy,
    /// There is no key to encrypt with.
    #[error(
        "the encryption key is too weak to protect anything: set SECRETS_KEYS_FILE to a ring with a better one"
    )]
    NoKey,
    /// The store did not do it.
    #[error(transparent)]
    Vault(#[from] VaultError),
}

impl From<StoreError> for RewrapError {
    fn from(error: StoreError) -> Self {
        Self::Vault(error.into())
    }
}

/// How far a run is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum RewrapState {
    /// It goes on.
    Running,
    /// All that could be done is done.
    Done,
    /// This node stopped. What is left is for another run.
    Stopped,
    /// It did not come to its end. What is left is for another run.
    Failed,
}

/// Something that could not be encrypted anew, and is left as it was.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Left {
    /// Which one, by names only.
    pub what: String,
    /// Why.
    pub reason: &'static str,
}

/// What a run has done so far.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct RewrapReport {
    /// How far it is.
    pub state: RewrapState,
    /// The key under which everything is encrypted.
    pub key: String,
    /// When it began, by this node's clock.
    pub started: Timestamp,
    /// When it ended.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ended: Option<Timestamp>,
    /// Documents that were looked at.
    pub examined: u64,
    /// Values that were encrypted anew.
    pub rewrapped: u64,
    /// Documents that somebody changed at the same moment.
    pub overtaken: u64,
    /// Results of named calls that cannot be encrypted anew, and are forgotten within a day.
    pub expiring: u64,
    /// How many values could not be opened.
    pub left_count: u64,
    /// The first of them.
    pub left: Vec<Left>,
    /// Why it failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// A run as others see it.
#[derive(Debug)]
pub struct Rewrapping(Mutex<RewrapReport>);

impl Rewrapping {
    /// What it has done so far.
    pub fn report(&self) -> RewrapReport {
        self.lock().clone()
    }

    fn lock(&self) -> MutexGuard<'_, RewrapReport> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn leave(&self, what: String, reason: CryptoErrorKind) {
        tracing::error!(%what, error.kind = %reason, "a stored value cannot be decrypted, and is left as it is");
        let mut report = self.lock();
        report.left_count += 1;
        if report.left.len() < REWRAP_NAMED {
            report.left.push(Left { what, reason: reason.as_str() });
        }
    }
}

/// A run that has its lease.
pub struct Rewrap {
    vault: Vault,
    lease: Lease,
    renewed: Instant,
    seen: Arc<Rewrapping>,
}

/// Why a run ended before its end.
enum Cut {
    Stopped,
    Failed(String),
}

impl From<StoreError> for Cut {
    fn from(error: StoreError) -> Self {
        Self::Failed(error.to_string())
    }
}

impl Vault {
    /// Takes the lease of rewrapping in the name of `owner`. One whose holder is gone is waited for, for a few
    /// seconds.
    pub async fn begin_rewrap(&self, owner: &str) -> Result<Rewrap, RewrapError> {
        let crypter = self.crypter();
        if crypter.mode() == LegacyMode::Rw {
            return Err(RewrapError::Legacy);
        }
        let primary = crypter.ring().primary_kid().ok_or(RewrapError::NoKey)?.to_owned();
        let lease = self.take_rewrap_lease(owner).await?;
        let report = RewrapReport {
            state: RewrapState::Running,
            key: primary,
            started: Timestamp::now(),
            ended: None,
            examined: 0,
            rewrapped: 0,
            overtaken: 0,
            expiring: 0,
            left_count: 0,
            left: Vec::new(),
            error: None,
        };
        let seen = Arc::new(Rewrapping(Mutex::new(report)));
        Ok(Rewrap { vault: self.clone(), lease, renewed: Instant::now(), seen })
    }

    /// Values of our own format that this node's keys do not open, where they stand.
    pub async fn unopened(&self) -> Result<Vec<Left>, VaultError> {
        let crypter = self.crypter();
        let mut left = Vec::new();
        let mut walk = Walk::new(&*self.store);
        while let Some(mut item) = walk.next().await? {
            let mut visit = |place: &Place<'_>, text: &str, _: Kind| {
                if is_sealed(text)
                    && let Err(error) = crypter.open(place, text)
                    && left.len() < REWRAP_NAMED
                {
                    left.push(Left { what: what(place), reason: error.kind().as_str() });
                }
                None
            };
            // Documents that are none of ours are told of elsewhere.
            let _ = item.visit(&mut visit);
        }
        Ok(left)
    }

    async fn take_rewrap_lease(&self, owner: &str) -> Result<Lease, RewrapError> {
        let mut watched = None;
        loop {
            let found = self.store.lease(LEASE).await?;
            let held = found.as_ref().and_then(|lease| Some((lease.owner.clone()?, lease.revision)));
            let Some((holder, revision)) = held else {
                // Whoever is faster is the one who rewraps.
                match self.store.take_lease(LEASE, owner, None).await {
                    Err(StoreError::Conflict) => continue,
                    taken => return Ok(taken?),
                }
            };
            let (seen, since) = *watched.get_or_insert((revision, Instant::now()));
            if seen != revision {
                return Err(RewrapError::Busy { owner: holder });
            }
            if since.elapsed() >= LEASE_TAKEOVER {
                match self.store.take_lease(LEASE, owner, Some(seen)).await {
                    Err(StoreError::Conflict) => return Err(RewrapError::Busy { owner: holder }),
                    taken => return Ok(taken?),
                }
            }
            sleep(WATCH).await;
        }
    }
}

impl Rewrap {
    /// The run, to look at while it goes on.
    pub fn seen(&self) -> Arc<Rewrapping> {
        Arc::clone(&self.seen)
    }

    /// Does it, with at most `rate` writes a second. What came of it is in the report.
    pub async fn run(mut self, rate: u32, stop: &CancellationToken) {
        let outcome = self.work(rate, stop).await;
        if let Err(error) = self.vault.store.release_lease(&self.lease).await {
            tracing::debug!(%error, "the lease of rewrapping was not given back; it ends by itself");
        }
        let mut report = self.seen.lock();
        report.ended = Some(Timestamp::now());
        report.state = match outcome {
            Ok(()) => RewrapState::Done,
            Err(Cut::Stopped) => RewrapState::Stopped,
            Err(Cut::Failed(why)) => {
                tracing::error!(error.cause = %why, "rewrapping was not completed");
                report.error = Some(why);
                RewrapState::Failed
            }
        };
        tracing::info!(
            key = %report.key, rewrapped = report.rewrapped, left = report.left_count, state = ?report.state,
            "rewrapping ended"
        );
    }

    async fn work(&mut self, rate: u32, stop: &CancellationToken) -> Result<(), Cut> {
        let store = Arc::clone(&self.vault.store);
        let primary = self.seen.report().key;
        let step = Duration::from_secs(1) / rate.max(1);
        let mut next = Instant::now();
        let mut walk = Walk::new(&*store);
        let mut idle = 0;
        while let Some(old) = walk.next().await? {
            if stop.is_cancelled() {
                return Err(Cut::Stopped);
            }
            self.keep_lease().await?;
            let crypter = self.vault.crypter();
            if crypter.ring().primary_kid() != Some(primary.as_str()) {
                return Err(Cut::Failed(
                    "the key that encrypts was changed meanwhile: begin again".to_owned(),
                ));
            }
            self.seen.lock().examined += 1;
            let (new, changed) = self.reseal(&crypter, &primary, &old);
            if changed == 0 {
                idle += 1;
                if idle % STRIDE == 0 {
                    sleep(PAUSE).await;
                }
                continue;
            }
            tokio::select! {
                () = sleep_until(next) => {}
                () = stop.cancelled() => return Err(Cut::Stopped),
            }
            next = next.max(Instant::now()) + step;
            let written = new.write(&old, &*store).await?;
            let mut report = self.seen.lock();
            match written {
                Written::Yes => report.rewrapped += changed,
                Written::Overtaken => report.overtaken += 1,
            }
        }
        Ok(())
    }

    /// A document with its texts under the primary key, and how many of them were not.
    fn reseal(&self, crypter: &Crypter, primary: &str, old: &Item) -> (Item, u64) {
        let mut new = old.clone();
        let mut changed = 0;
        let mut expiring = 0;
        let visited = new.visit(&mut |place, text, kind| {
            if kid_of(text) == Some(primary) {
                return None;
            }
            if kind == Kind::Expiring {
                expiring += 1;
                return None;
            }
            match resealed(crypter, place, text, kind) {
                Ok(text) => {
                    changed += 1;
                    Some(text)
                }
                Err(reason) => {
                    self.seen.leave(what(place), reason);
                    None
                }
            }
        });
        if let Err(reason) = visited {
            self.seen.leave(old.name(), reason);
        }
        // In clear, and of no use to anybody.
        changed += u64::from(drop_leftovers(&mut new));
        self.seen.lock().expiring += expiring;
        (new, changed)
    }

    /// Shows that somebody is at it, and finds out whether somebody else is.
    async fn keep_lease(&mut self) -> Result<(), Cut> {
        if self.renewed.elapsed() < LEASE_RENEWAL {
            return Ok(());
        }
        self.lease = match self.vault.store.renew_lease(&self.lease).await {
            Err(StoreError::Conflict) => {
                return Err(Cut::Failed("another node has taken over".to_owned()));
            }
            renewed => renewed?,
        };
        self.renewed = Instant::now();
        Ok(())
    }
}

/// The same value under the primary key.
fn resealed(crypter: &Crypter, place: &Place<'_>, text: &str, kind: Kind) -> Result<String, CryptoErrorKind> {
    let may_be_clear = kind == Kind::MayBeClear && crypter.mode() != LegacyMode::Off;
    let value = if may_be_clear && !is_sealed(text) && !is_legacy(text) {
        text.into()
    } else {
        crypter.open(place, text).map_err(|error| {
            crate::metrics::count_integrity_failure(error.kind());
            error.kind()
        })?
    };
    crypter.seal(place, &value).map_err(|error| error.kind())
}
