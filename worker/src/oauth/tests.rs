use std::collections::BTreeMap;

use futures_util::future::join_all;
use mcp_shared::{
    egress::Egress,
    remote::{BeginLogin, LoginId, OAuthTokens},
    store::{Store, embedded::EmbeddedStore},
    testing::authorization::{Authorization, Fault, Tokens as Minted},
    timestamp::Timestamp,
    vault::KeySource,
};
use serde_json::json;
use tempfile::TempDir;
use tokio::time::{sleep, timeout};

use super::*;

const KEY: &str = "k1:AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=";
/// How long anything may take that a test waits for.
const PATIENCE: Duration = Duration::from_secs(30);

/// A store, an authorization server and a remote server that names it. (It is the same machine: all that is
/// asked of the remote server here is who its authorization server is.)
struct World {
    store: Arc<EmbeddedStore>,
    authorization: Authorization,
    record: ServerRecord,
    key: Key,
    _folder: TempDir,
}

impl World {
    async fn new() -> Self {
        let folder = TempDir::new().unwrap();
        let store = EmbeddedStore::open(folder.path()).unwrap();
        let authorization = Authorization::start();
        let record = json!({
            "_id": "6b031cdd6c5c3ee8dbcb20dd", "name": "remote", "transportType": "streamable_http",
            "url": format!("{}/mcp", authorization.issuer()),
            "createdAt": "2026-11-22T16:48:29.287Z", "updatedAt": "2026-11-22T16:48:29.287Z",
        });
        let record = ServerRecord::from_document(record.as_object().unwrap().clone()).unwrap();
        let world = Self {
            key: (UserId::from_stored("alice"), record.name.clone()),
            store,
            authorization,
            record,
            _folder: folder,
        };
        world.vault().await.insert_server(&world.record).await.unwrap();
        world.authorization.add_client("client", Some("client-secret-canary"), &["https://example.com/back"]);
        world
    }

    async fn vault(&self) -> Vault {
        let store = Arc::clone(&self.store) as Arc<dyn Store>;
        Vault::open(store, KeySource::RingFile(KEY.into()), None).await.unwrap()
    }

    /// One worker's view.
    async fn worker(&self) -> OAuth {
        self.worker_behind(Egress::new(vec!["127.0.0.0/8".parse().unwrap()])).await
    }

    async fn worker_behind(&self, egress: Egress) -> OAuth {
        let (vault, http) = (self.vault().await, Outgoing::new(egress));
        OAuth::new(vault, http, WorkerId::generate(), TaskTracker::new(), CancellationToken::new())
    }

    fn mint(&self) -> Minted {
        self.authorization.mint("client", "alice", None)
    }

    /// Stores tokens that end in so many milliseconds.
    async fn give(&self, minted: &Minted, ends: Option<i64>) {
        let tokens = self.tokens(minted, ends);
        self.vault().await.replace_oauth_tokens(tokens).await.unwrap();
    }

    fn tokens(&self, minted: &Minted, ends: Option<i64>) -> OAuthTokens {
        OAuthTokens {
            user: self.key.0.clone(),
            server: self.key.1.clone(),
            issuer: Some(self.authorization.issuer()),
            token_type: "Bearer".into(),
            access_token: minted.access.clone().into(),
            refresh_token: minted.refresh.clone().map(Into::into),
            expires_at: ends.map(|ends| Timestamp::from_millis(Timestamp::now().millis() + ends)),
            scopes: Vec::new(),
            client_id: Some("client".into()),
            client_secret: Some("client-secret-canary".into()),
            redirect_uri: Some("https://example.com/back".into()),
            code_verifier: None,
            refreshing: None,
            refused: None,
            extra: serde_json::Map::new(),
        }
    }

    fn begin(&self, state: &str) -> RemoteAsk {
        RemoteAsk::BeginLogin(BeginLogin {
            id: LoginId::of(state),
            user: self.key.0.clone(),
            server: self.key.1.clone(),
            browser: "browser".into(),
            redirect_uri: "https://example.com/auth/callback".into(),
            client_document: None,
        })
    }

    /// Has one worker begin a login, and another finish it, twice at once.
    async fn log_in(&self, first: &OAuth, second: &OAuth, state: &str) {
        let RemoteAnswer::Login { url } = first.answer(self.begin(state)).await.unwrap() else { panic!() };
        let parameters: BTreeMap<_, _> = url::Url::parse(&url).unwrap().query_pairs().into_owned().collect();
        assert_eq!(parameters["code_challenge_method"], "S256");
        assert!(parameters.contains_key("resource") && !parameters.contains_key("state"), "{url}");
        let back = self.authorization.browse(&format!("{url}&state={state}"));
        let back: BTreeMap<_, _> = url::Url::parse(&back).unwrap().query_pairs().into_owned().collect();
        let vault = self.vault().await;
        let mut login = vault.login(&LoginId::of(state)).await.unwrap().unwrap();
        login.value.code = Some(back["code"].as_str().into());
        login.value.answered_by = back.get("iss").cloned();
        vault.put_login(&login.value, Some(login.revision)).await.unwrap();
        let finish = || second.answer(RemoteAsk::FinishLogin { id: LoginId::of(state) });
        let (one, other) = tokio::join!(finish(), finish());
        let (user, server) = self.key.clone();
        let outcomes = [one, other];
        assert!(outcomes.contains(&Ok(RemoteAnswer::LoggedIn { user, server })), "{outcomes:?}");
        let refused = outcomes.into_iter().find_map(Result::err).unwrap();
        assert_eq!(refused.code, ErrorCode::InvalidState);
    }

    async fn stored(&self) -> OAuthTokens {
        self.vault().await.oauth_tokens(&self.key.0, &self.key.1).await.unwrap().unwrap().value
    }

    async fn bearer(&self, oauth: &OAuth) -> Result<Option<Bearer>, WorkerError> {
        timeout(PATIENCE, oauth.bearer(&self.key.0, &self.record)).await.unwrap()
    }

    async fn refused(&self, oauth: &OAuth, bearer: Option<&Bearer>) -> Result<Bearer, WorkerError> {
        timeout(PATIENCE, oauth.refused(&self.key.0, &self.record, bearer, None)).await.unwrap()
    }
}

fn text(bearer: &Bearer) -> String {
    bearer.token.expose_secret().to_owned()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn eight_workers_that_meet_one_expired_token_refresh_it_once() {
    let world = World::new().await;
    world.give(&world.mint(), Some(-1)).await;
    // Long enough for all of them to be there.
    world.authorization.delay(Duration::from_millis(500));
    let workers = join_all((0..8).map(|_| world.worker())).await;
    let calls = workers.iter().flat_map(|worker| (0..8).map(|_| world.bearer(worker)));
    let bearers: Vec<_> = join_all(calls).await.into_iter().map(|got| text(&got.unwrap().unwrap())).collect();
    assert_eq!((world.authorization.refreshes(), world.authorization.reuses()), (1, 0));
    assert!(world.authorization.accepts(&bearers[0]).is_some());
    assert!(bearers.iter().all(|bearer| *bearer == bearers[0]));
    let stored = world.stored().await;
    assert_eq!(stored.access_token.expose_secret(), bearers[0]);
    assert!(stored.refreshing.is_none() && stored.expires_at.unwrap() > Timestamp::now());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn eight_workers_whose_token_is_refused_refresh_it_once() {
    let world = World::new().await;
    world.give(&world.mint(), None).await;
    world.authorization.delay(Duration::from_millis(500));
    let workers = join_all((0..8).map(|_| world.worker())).await;
    let old = world.bearer(&workers[0]).await.unwrap().unwrap();
    let tries = workers.iter().flat_map(|worker| (0..4).map(|_| world.refused(worker, Some(&old))));
    let bearers: Vec<_> = join_all(tries).await.into_iter().map(|got| text(&got.unwrap())).collect();
    assert!(bearers.iter().all(|bearer| *bearer == bearers[0] && *bearer != text(&old)));
    // One who comes late is given what is there.
    assert_eq!(text(&world.refused(&workers[3], Some(&old)).await.unwrap()), bearers[0]);
    assert_eq!((world.authorization.refreshes(), world.authorization.reuses()), (1, 0));
}

#[tokio::test]
async fn who_has_none_is_sent_to_log_in() {
    let world = World::new().await;
    let worker = world.worker().await;
    assert!(world.bearer(&worker).await.unwrap().is_none());
    let error = world.refused(&worker, None).await.unwrap_err();
    assert_eq!((error.code, error.outcome), (ErrorCode::ReauthRequired, Some(Outcome::NotStarted)));
    assert_eq!(
        (&error.details["serverName"], &error.details["username"]),
        (&json!("remote"), &json!("alice"))
    );
    // Tokens that came meanwhile are seen, even if nobody announced them.
    let minted = world.mint();
    world.give(&minted, None).await;
    assert!(world.bearer(&worker).await.unwrap().is_none());
    assert_eq!(text(&world.refused(&worker, None).await.unwrap()), minted.access);
    worker.forget(&world.key.0, &world.key.1);
    assert_eq!(text(&world.bearer(&worker).await.unwrap().unwrap()), minted.access);
}

#[tokio::test]
async fn a_server_that_takes_no_token_at_all_has_none_refreshed_at_every_call() {
    let world = World::new().await;
    world.give(&world.mint(), None).await;
    let worker = world.worker().await;
    let old = world.bearer(&worker).await.unwrap().unwrap();
    let new = world.refused(&worker, Some(&old)).await.unwrap();
    let error = reauth(&world.key, None, "is not accepted");
    worker.spurned(&world.key.0, &world.record, Some(&new), &error);
    for _ in 0..3 {
        let bearer = world.bearer(&worker).await.unwrap().unwrap();
        assert_eq!(text(&bearer), text(&new));
        assert_eq!(world.refused(&worker, Some(&bearer)).await.unwrap_err(), error);
    }
    assert_eq!(world.authorization.refreshes(), 1);
    // Other tokens are another matter.
    world.give(&world.mint(), None).await;
    worker.forget(&world.key.0, &world.key.1);
    let bearer = world.bearer(&worker).await.unwrap().unwrap();
    assert!(world.refused(&worker, Some(&bearer)).await.is_ok());
}

#[tokio::test]
async fn a_refused_refresh_token_is_sent_once() {
    let world = World::new().await;
    let minted = world.mint();
    world.give(&minted, Some(-1)).await;
    world.authorization.revoke_all();
    let worker = world.worker().await;
    for _ in 0..3 {
        let error = world.bearer(&worker).await.unwrap_err();
        assert_eq!(error.code, ErrorCode::ReauthRequired);
        assert_eq!(error.details["authorizationServer"], world.authorization.issuer());
        assert!(!format!("{error:?}").contains(minted.refresh.as_deref().unwrap()));
    }
    let other = world.worker().await;
    assert_eq!(world.bearer(&other).await.unwrap_err().code, ErrorCode::ReauthRequired);
    assert_eq!(world.authorization.refreshes(), 1);
    assert_eq!(world.stored().await.refused.as_deref(), Some("invalid_grant"));
    // A new login mends it.
    let minted = world.mint();
    world.give(&minted, None).await;
    assert_eq!(text(&world.bearer(&other).await.unwrap().unwrap()), minted.access);
}

#[tokio::test]
async fn an_authorization_server_that_is_down_ends_no_login() {
    let world = World::new().await;
    let worker = world.worker().await;
    for fault in
        [Fault::Status(503), Fault::Garbage, Fault::Huge, Fault::Redirect("http://127.0.0.1:9/".into())]
    {
        world.authorization.fault("/token", Some(fault.clone()));
        world.give(&world.mint(), Some(-1)).await;
        worker.forget_all();
        let error = world.bearer(&worker).await.unwrap_err();
        assert!(error.code != ErrorCode::ReauthRequired && error.code.retryable(), "{fault:?}: {error:?}");
        let stored = world.stored().await;
        assert!(stored.refused.is_none() && stored.refreshing.is_none(), "{fault:?}");
    }
    // All who come at once afterwards hear the same, without a request of their own.
    let before = world.authorization.refreshes();
    assert!(world.bearer(&worker).await.is_err());
    assert_eq!(world.authorization.refreshes(), before);
    world.authorization.fault("/token", None);
    let renewed = timeout(PATIENCE, async {
        loop {
            match world.bearer(&worker).await {
                Ok(bearer) => break bearer.unwrap(),
                Err(_) => sleep(Duration::from_millis(50)).await,
            }
        }
    });
    assert!(world.authorization.accepts(&text(&renewed.await.unwrap())).is_some());
}

#[tokio::test]
async fn a_token_that_lives_serves_until_it_ends() {
    let world = World::new().await;
    world.authorization.fault("/token", Some(Fault::Status(503)));
    let minted = world.mint();
    world.give(&minted, Some(4_000)).await;
    let worker = world.worker().await;
    assert_eq!(text(&world.bearer(&worker).await.unwrap().unwrap()), minted.access);
    let ends = world.stored().await.expires_at.unwrap();
    // It is tried after half of the time, and the old one serves all the same.
    timeout(PATIENCE, async {
        while world.authorization.refreshes() == 0 {
            let bearer = world.bearer(&worker).await.unwrap().unwrap();
            assert!(Timestamp::now() < ends && text(&bearer) == minted.access);
            sleep(Duration::from_millis(20)).await;
        }
    })
    .await
    .unwrap();
}

#[tokio::test]
async fn nothing_is_sent_to_an_authorization_server_that_did_not_give_the_tokens() {
    let world = World::new().await;
    let minted = world.mint();
    let mut tokens = world.tokens(&minted, Some(-1));
    tokens.issuer = Some("https://login.example.com".into());
    world.vault().await.replace_oauth_tokens(tokens).await.unwrap();
    let worker = world.worker().await;
    let error = world.bearer(&worker).await.unwrap_err();
    assert_eq!(error.code, ErrorCode::ReauthRequired);
    assert_eq!(error.details["authorizationServer"], "https://login.example.com");
    let seen = |secret: &str| world.authorization.has_seen(secret);
    assert!(!seen(minted.refresh.as_deref().unwrap()) && !seen("client-secret-canary"));
    assert_eq!(world.authorization.token_requests(), 0);
    // Tokens without an issuer are bound by their first refresh.
    let mut tokens = world.tokens(&minted, Some(-1));
    tokens.issuer = None;
    world.vault().await.replace_oauth_tokens(tokens).await.unwrap();
    worker.forget_all();
    assert!(world.bearer(&worker).await.unwrap().is_some());
    assert!(same_issuer(&world.stored().await.issuer.unwrap(), &world.authorization.issuer()));
}

#[tokio::test]
async fn a_login_that_comes_during_a_refresh_wins() {
    let world = World::new().await;
    world.give(&world.mint(), Some(-1)).await;
    world.authorization.delay(Duration::from_millis(700));
    let worker = world.worker().await;
    let (minted, during) = (world.mint(), async {
        while world.authorization.refreshes() == 0 {
            sleep(Duration::from_millis(5)).await;
        }
    });
    let login = async {
        during.await;
        world.give(&minted, None).await;
        worker.forget(&world.key.0, &world.key.1);
    };
    let (bearer, ()) = tokio::join!(world.bearer(&worker), login);
    assert_eq!(text(&bearer.unwrap().unwrap()), minted.access);
    assert_eq!(world.stored().await.access_token.expose_secret(), minted.access);
    assert_eq!(text(&world.bearer(&worker).await.unwrap().unwrap()), minted.access);
}

#[tokio::test]
async fn a_refresh_goes_on_without_its_caller() {
    let world = World::new().await;
    let minted = world.mint();
    world.give(&minted, Some(-1)).await;
    world.authorization.delay(Duration::from_millis(500));
    let worker = world.worker().await;
    tokio::select! {
        _ = world.bearer(&worker) => panic!("the authorization server takes its time"),
        () = async {
            while world.authorization.refreshes() == 0 {
                sleep(Duration::from_millis(5)).await;
            }
        } => {}
    }
    worker.0.tasks.close();
    timeout(PATIENCE, worker.0.tasks.wait()).await.unwrap();
    let stored = world.stored().await;
    assert_ne!(stored.refresh_token.unwrap().expose_secret(), minted.refresh.unwrap());
    assert!(world.authorization.accepts(stored.access_token.expose_secret()).is_some());
}

#[tokio::test]
async fn the_claim_of_a_lost_worker_runs_out() {
    let world = World::new().await;
    let mut tokens = world.tokens(&world.mint(), Some(-1));
    tokens.refreshing = Some(WorkerId::generate());
    world.vault().await.replace_oauth_tokens(tokens).await.unwrap();
    let mut worker = world.worker().await;
    let takeover = Duration::from_millis(600);
    Arc::get_mut(&mut worker.0).unwrap().takeover = takeover;
    let begun = std::time::Instant::now();
    assert!(world.bearer(&worker).await.unwrap().is_some());
    assert!(begun.elapsed() >= takeover);
    assert_eq!(world.authorization.refreshes(), 1);
}

#[tokio::test]
async fn an_address_that_is_blocked_is_no_reason_to_log_in() {
    let world = World::new().await;
    world.give(&world.mint(), Some(-1)).await;
    let worker = world.worker_behind(Egress::default()).await;
    let error = world.bearer(&worker).await.unwrap_err();
    assert_eq!((error.code, error.outcome), (ErrorCode::BlockedAddress, Some(Outcome::NotStarted)));
    assert!(world.authorization.requests().is_empty());
}

#[tokio::test]
async fn a_login_is_begun_by_one_worker_and_finished_by_another() {
    let world = World::new().await;
    let (first, second) = (world.worker().await, world.worker().await);
    for state in ["one", "two"] {
        world.log_in(&first, &second, state).await;
        let token = world.bearer(&second).await.unwrap().unwrap();
        assert!(world.authorization.accepts(&text(&token)).is_some());
        let stored = world.stored().await;
        assert!(same_issuer(&stored.issuer.unwrap(), &world.authorization.issuer()));
    }
    // The second login used the registration of the first.
    assert_eq!(world.authorization.registrations(), 1);
    let issuer = second.answer(RemoteAsk::Issuer { server: world.key.1.clone() }).await.unwrap();
    let RemoteAnswer::Issuer { issuer: Some(issuer) } = issuer else { panic!("{issuer:?}") };
    assert!(same_issuer(&issuer, &world.authorization.issuer()));
}

#[tokio::test]
async fn a_server_of_the_time_before_discovery_is_logged_in_to() {
    let world = World::new().await;
    let worker = world.worker().await;
    world.authorization.change(|settings| {
        settings.oauth_metadata = false;
        settings.iss = false;
    });
    // One that asks for no login is not taken for such.
    let error = worker.answer(world.begin("none")).await.unwrap_err();
    assert_eq!((error.code, error.outcome), (ErrorCode::LoginFailed, None));
    let none = worker.answer(RemoteAsk::Issuer { server: world.key.1.clone() }).await.unwrap();
    assert_eq!(none, RemoteAnswer::Issuer { issuer: None });
    world.authorization.fault("/mcp", Some(Fault::Says(401, "{}".to_owned())));
    world.log_in(&worker, &worker, "state").await;
    let token = world.bearer(&worker).await.unwrap().unwrap();
    let renewed = world.refused(&worker, Some(&token)).await.unwrap();
    assert!(text(&renewed) != text(&token) && world.authorization.accepts(&text(&renewed)).is_some());
}

#[tokio::test]
async fn an_answer_of_another_authorization_server_is_refused() {
    let world = World::new().await;
    let worker = world.worker().await;
    let vault = world.vault().await;
    let id = LoginId::of("state");
    worker.answer(world.begin("state")).await.unwrap();
    let mut login = vault.login(&id).await.unwrap().unwrap();
    login.value.code = Some("code".into());
    login.value.answered_by = Some("https://login.example.com".into());
    vault.put_login(&login.value, Some(login.revision)).await.unwrap();
    let error = worker.answer(RemoteAsk::FinishLogin { id }).await.unwrap_err();
    assert_eq!(error.code, ErrorCode::LoginFailed);
    assert_eq!(world.authorization.token_requests(), 0);
}
