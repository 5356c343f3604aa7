use std::io::{Read, Write};

use super::*;

/// Reads until a line end; `nats-server` greets with its INFO.
fn greeting(address: SocketAddr) -> String {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    let mut said = Vec::new();
    let mut byte = [0];
    while !said.ends_with(b"\n") {
        stream.read_exact(&mut byte).unwrap();
        said.push(byte[0]);
    }
    String::from_utf8(said).unwrap()
}

fn alive(pid: u32) -> bool {
    kill(Pid::from_raw(i32::try_from(pid).unwrap()), None).is_ok()
}

#[test]
fn a_nats_server_has_its_configuration_and_keeps_its_port() {
    let mut server = NatsServer::start("max_payload: 4096");
    let address = server.address();
    assert!(address.ip().is_loopback());
    assert_eq!(server.url(), format!("nats://{address}"));
    assert!(greeting(address).contains("\"max_payload\":4096"));

    let first = server.pid();
    server.kill();
    assert!(TcpStream::connect(address).is_err() && !alive(first));
    server.restart();
    assert_ne!(server.pid(), first);
    assert_eq!(server.address(), address);
    assert!(greeting(address).contains("\"max_payload\":4096"));

    let (second, folder) = (server.pid(), server.process.folder.path.clone());
    drop(server);
    assert!(!alive(second) && !folder.exists());
}

#[test]
fn servers_of_a_process_are_shared() {
    assert_eq!(shared_nats().pid(), shared_nats().pid());
    assert!(std::ptr::eq(shared_mongo(), shared_mongo()));
    let mut nats = TcpStream::connect(shared_nats().address()).unwrap();
    nats.write_all(b"PING\r\n").unwrap();
}

#[test]
fn tests_share_a_mongodb_and_the_next_ones_another() {
    let given: Vec<_> = (0..13).map(|_| mongo_for_a_test()).collect();
    let mut addresses: Vec<_> = given.iter().map(Mongo::uri).collect();
    addresses.dedup();
    let launched = given[0].0.server.is_some();
    assert_eq!(addresses.len(), if launched { 2 } else { 1 }, "{addresses:?}");
    let first = given[0].0.server.as_ref().map(MongoServer::pid);
    drop(given);
    assert!(first.is_none_or(|first| !alive(first)), "nobody holds it any more");
}

#[test]
fn a_server_outlives_the_thread_that_asked_for_it() {
    let server = thread::spawn(|| NatsServer::start("")).join().unwrap();
    thread::sleep(Duration::from_millis(100));
    assert!(greeting(server.address()).starts_with("INFO "));
}

#[test]
#[should_panic(expected = "did not get as far")]
fn a_server_that_does_not_start_says_why() {
    NatsServer::start("no such setting {");
}

/// Does something only when the next test runs it, in a process of its own that it then kills.
#[test]
fn helper_that_waits_to_be_killed() {
    let Ok(file) = env::var("TEST_SERVER_PIDS") else { return };
    let (nats, mongo) = (NatsServer::start(""), MongoServer::start());
    fs::write(format!("{file}.new"), format!("{} {}", nats.pid(), mongo.pid())).unwrap();
    fs::rename(format!("{file}.new"), file).unwrap();
    thread::sleep(Duration::from_secs(600));
}

#[test]
fn servers_end_with_a_killed_process() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("pids");
    let mut command = Command::new(env::current_exe().unwrap());
    command
        .args(["--exact", "testing::services::tests::helper_that_waits_to_be_killed"])
        .env("TEST_SERVER_PIDS", &file)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let mut child = spawn(command).unwrap();
    let begun = Instant::now();
    while !file.exists() {
        assert!(begun.elapsed() < 2 * START_TIMEOUT && child.try_wait().unwrap().is_none());
        thread::sleep(PAUSE);
    }
    let pids: Vec<u32> =
        fs::read_to_string(&file).unwrap().split(' ').map(|pid| pid.parse().unwrap()).collect();
    assert!(pids.iter().all(|pid| alive(*pid)));
    child.kill().unwrap();
    child.wait().unwrap();
    let begun = Instant::now();
    // A process that ended may wait for its new parent to notice; it does not run any more.
    let runs = |pid: &u32| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        stat.rsplit_once(')').is_some_and(|(_, rest)| !rest.trim_start().starts_with(['Z', 'X']))
    };
    while pids.iter().any(runs) {
        assert!(begun.elapsed() < Duration::from_secs(20), "{pids:?} outlived their parent");
        thread::sleep(PAUSE);
    }
}
