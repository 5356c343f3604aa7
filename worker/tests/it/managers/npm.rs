//! npm.

use super::*;

#[tokio::test(flavor = "multi_thread")]
async fn packages_are_resolved_built_and_run() {
    let bench = Bench::new();
    let registry = &bench.registry;
    for version in ["1.0.0", "1.2.0", "2.0.0", "3.0.0-beta.1"] {
        registry.add_npm(
            "@some/server",
            version,
            &[("dist/cli.js", &node_server(version))],
            r#"{"bin": "dist/cli.js", "dependencies": {"needed": "^1.0.0"}}"#,
        );
    }
    registry.add_npm("needed", "1.0.1", &[("i.js", "")], r#"{"main": "i.js"}"#);
    registry.tag_npm("@some/server", "next", "3.0.0-beta.1");
    for (asked, version) in [
        (None, "2.0.0"),
        (Some("latest"), "2.0.0"),
        (Some("next"), "3.0.0-beta.1"),
        (Some("^1.0.0"), "1.2.0"),
        (Some(">=1 <1.2 || 1.0.x"), "1.0.0"),
        (Some("1.0.0"), "1.0.0"),
    ] {
        let lock = bench.resolve(&npm("@some/server", asked)).await.unwrap();
        assert_eq!((lock.name.as_str(), lock.version.as_str()), ("@some/server", version), "{asked:?}");
        assert!(
            lock.files["package.json"].contains(&format!("\"{version}\"")),
            "{}",
            lock.files["package.json"]
        );
        assert!(!lock.files["package-lock.json"].contains("127.0.0.1"), "a lock is of no place");
    }
    let spec = npm("@some/server", Some("~1.2"));
    let (lock, folder) = bench.install(&spec).await;
    let (command, args) = bench.entry(&spec, "", &["--more"], &folder).unwrap();
    assert_eq!(command, "node");
    assert_eq!(args, ["./packages/x/node_modules/@some/server/dist/cli.js", "--more"]);
    let script = folder.join(args[0].strip_prefix("./packages/x/").unwrap());
    let answer = ask_server(Path::new("node"), &[script.to_str().unwrap()], &folder);
    assert!(answer.contains(r#""version":"1.2.0""#), "{answer}");
    assert!(folder.join("node_modules/needed/i.js").is_file());
    // The same lock is the same folder, whatever came out since.
    registry.add_npm("needed", "1.9.0", &[("i.js", "new")], "{}");
    let again = bench.build(&lock).await.unwrap();
    assert_eq!(std::fs::read_to_string(again.join("node_modules/needed/i.js")).unwrap(), "");
    assert_eq!(bench.latest(Runtime::Node, "@some/server").await.unwrap(), "2.0.0");
}

/// A package that runs `i.js`.
fn plain(bench: &Bench, name: &str, version: &str, more: &str) {
    let package = format!(r#"{{"main": "i.js"{more}}}"#);
    bench.registry.add_npm(name, version, &[("i.js", &node_server(version))], &package);
}

async fn refused(bench: &Bench, spec: &PackageSpec) -> WorkerError {
    bench.resolve(spec).await.unwrap_err()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_registry_does_not_have() {
    let bench = Bench::new();
    plain(&bench, "plain", "1.0.0", "");
    plain(&bench, "orphan", "1.0.0", r#", "dependencies": {"no-such-zz": "1"}"#);
    plain(&bench, "behind", "1.0.0", r#", "dependencies": {"plain": "^7"}"#);
    for (name, version, code, message) in [
        ("@no/such", None, ErrorCode::PackageNotFound, "The registry has no package @no/such"),
        ("plain", Some("9.9.9"), ErrorCode::VersionNotFound, "The registry has no plain@9.9.9"),
        ("plain", Some("^3"), ErrorCode::VersionNotFound, "The registry has no plain@^3"),
        ("plain", Some("next"), ErrorCode::VersionNotFound, "The registry has no plain@next"),
        (
            "orphan",
            None,
            ErrorCode::InstallFailed,
            "orphan needs no-such-zz, which the registry does not have",
        ),
        (
            "behind",
            None,
            ErrorCode::InstallFailed,
            "behind needs a fitting version of plain, which the registry does not have",
        ),
    ] {
        let error = refused(&bench, &npm(name, version)).await;
        assert_eq!((error.code, error.message.as_str()), (code, message), "{error:?}");
        assert!(details(&error).to_lowercase().contains("npm err"), "{error:?}");
        assert!(!details(&error).contains(bench.folder.path().to_str().unwrap()));
    }
    let error = bench.latest(Runtime::Node, "@no/such").await.unwrap_err();
    assert_eq!(error.code, ErrorCode::PackageNotFound);
    // A file that is gone, of something that it needs.
    plain(&bench, "uses", "1.0.0", r#", "dependencies": {"plain": "1"}"#);
    let lock = bench.resolve(&npm("uses", None)).await.unwrap();
    bench.registry.remove_file("/plain/-/plain-1.0.0.tgz");
    let error = bench.build(&lock).await.unwrap_err();
    let message = "uses@1.0.0 needs plain, which the registry does not have";
    assert_eq!((error.code, error.message.as_str()), (ErrorCode::InstallFailed, message), "{error:?}");
    // A version that was withdrawn since it was locked.
    let lock = bench.resolve(&npm("plain", None)).await.unwrap();
    bench.registry.remove("plain");
    plain(&bench, "plain", "2.0.0", "");
    let error = bench.build(&lock).await.unwrap_err();
    assert_eq!(
        (error.code, error.message.as_str()),
        (ErrorCode::VersionNotFound, "The registry has no plain@1.0.0")
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_that_is_ill_may_recover() {
    let bench = Bench::new();
    plain(&bench, "plain", "1.0.0", "");
    let lock = bench.resolve(&npm("plain", None)).await.unwrap();
    for fault in [Fault::Down, Fault::Status(503), Fault::Garbage] {
        bench.registry.fault(fault);
        for error in [
            refused(&bench, &npm("plain", None)).await,
            bench.build(&lock).await.unwrap_err(),
            bench.latest(Runtime::Node, "plain").await.unwrap_err(),
        ] {
            assert_eq!(error.code, ErrorCode::RegistryUnavailable, "{fault:?}: {error:?}");
            assert!(error.code.retryable());
        }
    }
    bench.registry.fault(Fault::Status(403));
    assert_eq!(refused(&bench, &npm("plain", None)).await.code, ErrorCode::InstallFailed);
    bench.registry.fault(Fault::None);
    bench.install(&npm("plain", None)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_breaks_off_is_not_installed() {
    let bench = Bench::new();
    plain(&bench, "plain", "1.0.0", "");
    let lock = bench.resolve(&npm("plain", None)).await.unwrap();
    bench.registry.fault(Fault::Broken);
    let error = bench.build(&lock).await.unwrap_err();
    assert_eq!(error.code, ErrorCode::RegistryUnavailable, "{error:?}");
    bench.registry.fault(Fault::None);
    bench.build(&lock).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn other_bytes_than_were_locked_are_refused() {
    let bench = Bench::new();
    plain(&bench, "plain", "1.0.0", "");
    let lock = bench.resolve(&npm("plain", None)).await.unwrap();
    // The registry has other bytes now, with their own right hash.
    bench.registry.remove("plain");
    bench.registry.add_npm("plain", "1.0.0", &[("i.js", "evil")], r#"{"main": "i.js"}"#);
    let error = bench.build(&lock).await.unwrap_err();
    assert_eq!(error.code, ErrorCode::IntegrityMismatch, "{error:?}");
    assert!(!error.code.retryable());
    // Bytes that changed on the way.
    let fresh = bench.resolve(&npm("plain", None)).await.unwrap();
    bench.registry.fault(Fault::Corrupt);
    assert_eq!(bench.build(&fresh).await.unwrap_err().code, ErrorCode::IntegrityMismatch);
    // A lock that says nothing of hashes, or of another place.
    bench.registry.fault(Fault::None);
    for (what, instead) in [
        ("\"integrity\"", "\"none\""),
        ("\"version\": \"1.0.0\"", "\"resolved\": \"http://127.0.0.1:1/x.tgz\""),
    ] {
        let mut changed = fresh.clone();
        let text = changed.files.get_mut("package-lock.json").unwrap();
        assert!(text.contains(what), "{text}");
        *text = text.replace(what, instead);
        assert_eq!(bench.build(&changed).await.unwrap_err().code, ErrorCode::InstallFailed);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn warnings_fail_only_who_wants_that() {
    let bench = Bench::new();
    plain(&bench, "old", "1.0.0", r#", "deprecated": "use another""#);
    plain(&bench, "uses-old", "1.0.0", r#", "dependencies": {"old": "1"}"#);
    plain(&bench, "future", "1.0.0", r#", "engines": {"node": ">=99"}"#);
    plain(&bench, "fine", "1.0.0", "");
    for name in ["uses-old", "future", "fine"] {
        let mut spec = npm(name, None);
        bench.install(&spec).await;
        spec.fail_on_warning = true;
        match bench.resolve(&spec).await {
            Ok(_) => assert_eq!(name, "fine"),
            Err(error) => {
                assert_eq!(error.code, ErrorCode::InstallWarnings, "{error:?}");
                let word = if name == "future" { "EBADENGINE" } else { "use another" };
                assert!(details(&error).contains(word), "{error:?}");
            }
        }
    }
}

#[test]
fn programs_of_packages_are_found_inside_them() {
    let bench = Bench::new();
    let folder = bench.empty("built");
    for (name, package, program) in [
        ("string", r#"{"bin": "./a.js", "main": "b"}"#, Some("a.js")),
        ("same", r#"{"bin": {"zz": "a.js", "same": "b/index.js", "aa": "a.js"}}"#, Some("b/index.js")),
        ("only", r#"{"bin": {"zz": "a.js"}}"#, Some("a.js")),
        ("first", r#"{"bin": {"zz": "a.js", "aa": "b/index.js"}}"#, Some("b/index.js")),
        ("@scope/same", r#"{"bin": {"aa": "a.js", "same": "b/index.js"}}"#, Some("b/index.js")),
        ("main", r#"{"main": "a"}"#, Some("a.js")),
        ("folder", r#"{"main": "./b"}"#, Some("b/index.js")),
        ("missing", r#"{"bin": "c.js"}"#, None),
        ("none", "{}", None),
        ("out", r#"{"main": "../../../etc/passwd"}"#, None),
        ("absolute", r#"{"main": "/etc/passwd"}"#, None),
    ] {
        let inner = folder.join("node_modules").join(name);
        std::fs::create_dir_all(inner.join("b")).unwrap();
        for (file, text) in [("package.json", package), ("a.js", "a"), ("b/index.js", "b")] {
            std::fs::write(inner.join(file), text).unwrap();
        }
        let spec = npm(name, None);
        match bench.entry(&spec, "", &[], &folder) {
            Ok((_, args)) => {
                let expected = format!("./packages/x/node_modules/{name}/{}", program.expect(name));
                assert_eq!(args, [expected]);
            }
            Err(error) => {
                assert_eq!((error.code, program), (ErrorCode::NoEntryPoint, None), "{name}: {error:?}");
            }
        }
        let given = bench.entry(&spec, "bun", &["run", "x"], &folder).unwrap();
        assert_eq!(given, ("bun".to_owned(), vec!["run".to_owned(), "x".to_owned()]));
    }
    // A link that leads out of the package.
    let spec = npm("string", None);
    let program = folder.join("node_modules/string/a.js");
    std::fs::remove_file(&program).unwrap();
    std::os::unix::fs::symlink("/etc/passwd", &program).unwrap();
    assert_eq!(bench.entry(&spec, "", &[], &folder).unwrap_err().code, ErrorCode::NoEntryPoint);
}

#[tokio::test(flavor = "multi_thread")]
async fn scripts_run_only_where_that_was_allowed() {
    let bench = Bench::new();
    plain(&bench, "scripted", "1.0.0", r#", "scripts": {"postinstall": "env > ran.txt"}"#);
    plain(&bench, "uses", "1.0.0", r#", "dependencies": {"scripted": "1"}"#);
    let mut spec = npm("uses", None);
    let (lock, folder) = bench.install(&spec).await;
    assert_eq!(lock.skipped_scripts, ["scripted"]);
    assert!(!folder.join("node_modules/scripted/ran.txt").exists());

    spec.allow_scripts = true;
    let (lock, folder) = bench.install(&spec).await;
    assert!(lock.allow_scripts && lock.skipped_scripts.is_empty());
    let seen = std::fs::read_to_string(folder.join("node_modules/scripted/ran.txt")).unwrap();
    assert!(!seen.contains("canary"), "secrets of ours are nobody's business: {seen}");

    plain(&bench, "failing", "1.0.0", r#", "scripts": {"install": "echo so it is; exit 3"}"#);
    let mut spec = npm("failing", None);
    bench.install(&spec).await;
    spec.allow_scripts = true;
    let lock = bench.resolve(&spec).await.unwrap();
    let error = bench.build(&lock).await.unwrap_err();
    assert_eq!(error.message, "A script of failing@1.0.0 failed", "{error:?}");
    assert!(details(&error).contains("so it is"), "{error:?}");
    // What a script leaves running ends with it.
    plain(&bench, "daemon", "1.0.0", r#", "scripts": {"install": "setsid sleep 300 >/dev/null 2>&1 &"}"#);
    let lock = bench.resolve(&PackageSpec { allow_scripts: true, ..npm("daemon", None) }).await.unwrap();
    bench.managers.build(&lock, &bench.empty("built"), &bench.work()).await.unwrap();
    // Of what left the group it is only said that it goes.
    tokio::time::sleep(Duration::from_millis(500)).await;
    bench.nothing_runs();
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_comes_from_outside_of_the_registry() {
    let bench = Bench::new();
    let url = format!("{}plain/-/plain-1.0.0.tgz", bench.registry.npm_url());
    plain(&bench, "plain", "1.0.0", "");
    for (name, address) in [
        ("git-dep", "git+ssh://git@127.0.0.1:1/x/y.git"),
        ("url-dep", url.as_str()),
        ("file-dep", "file:/etc"),
        ("alias-dep", "npm:plain@file:/etc"),
    ] {
        plain(&bench, name, "1.0.0", &format!(r#", "dependencies": {{"z": "{address}"}}"#));
        let error = refused(&bench, &npm(name, None)).await;
        assert_eq!(error.code, ErrorCode::InstallFailed, "{name}: {error:?}");
    }
    let asked = bench.registry.requests().len();
    let names = ["-g", "--prefix=/", "..", "a@file:/etc", "git+ssh://x", "$(id)", "a;id", "", "A"];
    for name in names {
        assert_eq!(refused(&bench, &npm(name, None)).await.code, ErrorCode::InvalidPackageName, "{name}");
        let latest = bench.latest(Runtime::Node, name).await.unwrap_err();
        assert_eq!(latest.code, ErrorCode::InvalidPackageName, "{name}");
    }
    for version in ["-g", "file:/etc", "git+https://x", "https://x/y.tgz", "npm:other", "1;id", ">=0\n"] {
        let error = refused(&bench, &npm("plain", Some(version))).await;
        assert_eq!(error.code, ErrorCode::InvalidVersion, "{version}");
    }
    assert_eq!(bench.registry.requests().len(), asked, "nothing was asked for");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_that_hangs_is_not_waited_for() {
    let short = Duration::from_millis(1_500);
    let silent = Bench::with(Installer::Pip, Bounds { silence: short, ..Bounds::default() });
    let slow = Bench::with(Installer::Pip, Bounds { time: short, latest: short, ..Bounds::default() });
    for bench in [&silent, &slow] {
        plain(bench, "plain", "1.0.0", "");
        bench.registry.fault(Fault::Hang);
        let error = refused(bench, &npm("plain", None)).await;
        assert_eq!(error.code, ErrorCode::InstallTimeout, "{error:?}");
        assert!(error.code.retryable());
    }
    let error = slow.latest(Runtime::Node, "plain").await.unwrap_err();
    assert_eq!(error.code, ErrorCode::RegistryUnavailable, "{error:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn who_leaves_leaves_nothing_running() {
    let bench = Arc::new(Bench::new());
    plain(&bench, "plain", "1.0.0", "");
    bench.registry.fault(Fault::Hang);
    let waiting = tokio::spawn({
        let bench = Arc::clone(&bench);
        async move { bench.resolve(&npm("plain", None)).await }
    });
    while bench.registry.requests().is_empty() {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    bench.cancelled.cancel();
    let cancelled = tokio::time::timeout(Duration::from_secs(5), waiting).await.unwrap().unwrap();
    assert_eq!(cancelled.unwrap_err().code, ErrorCode::Cancelled);
    // And at once, when it is known before.
    assert_eq!(bench.resolve(&npm("plain", None)).await.unwrap_err().code, ErrorCode::Cancelled);
}

#[tokio::test(flavor = "multi_thread")]
async fn installations_have_a_size() {
    let many: Vec<(String, String)> = (0..600).map(|n| (format!("f{n}.js"), "x".repeat(20_000))).collect();
    let files: Vec<(&str, &str)> = many.iter().map(|(name, text)| (name.as_str(), text.as_str())).collect();
    for bounds in
        [Bounds { bytes: 4_000_000, ..Bounds::default() }, Bounds { files: 300, ..Bounds::default() }]
    {
        let bench = Bench::with(Installer::Pip, bounds);
        // Something keeps it busy long enough to be looked at.
        bench.registry.add_npm("large", "1.0.0", &files, r#"{"scripts": {"install": "sleep 20"}}"#);
        let lock = bench.resolve(&PackageSpec { allow_scripts: true, ..npm("large", None) }).await.unwrap();
        let error = bench.build(&lock).await.unwrap_err();
        assert_eq!(error.code, ErrorCode::InstallTooLarge, "{error:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_without_npm_says_so() {
    let mut bench = Bench::new();
    let nowhere = BTreeMap::from([("PATH".to_owned(), bench.folder.path().to_str().unwrap().to_owned())]);
    bench.managers = Managers::with(&bench.settings, nowhere, Bounds::default());
    let error = refused(&bench, &npm("plain", None)).await;
    assert_eq!(
        (error.code, error.message.as_str()),
        (ErrorCode::RuntimeMissing, "This worker has no `node` in PATH")
    );
}
