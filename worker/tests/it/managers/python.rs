//! pip and uv.

use super::*;

/// A server with a module, a console script and something that it needs.
fn publish(registry: &Registry, version: &str) {
    registry.add_wheel(
        "Hand.Srv",
        version,
        &[
            ("hand_srv/__init__.py", &python_server(version)),
            ("hand_srv/__main__.py", "from hand_srv import main\nmain()\n"),
        ],
        Wheel { requires: &["needed>=1"], scripts: &[("hand-srv", "hand_srv:main")], ..Wheel::default() },
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn packages_are_resolved_built_and_run() {
    for installer in [Installer::Uv, Installer::Pip] {
        let bench = Bench::with(installer, Bounds::default());
        for version in ["1.0.0", "1.1.0", "2.0.0rc1"] {
            publish(&bench.registry, version);
        }
        for version in ["0.9", "1.0", "1.5"] {
            bench.registry.add_python("needed", version, &[("needed.py", "")]);
        }
        let mut spec = python("hand_srv", None);
        spec.python_module = Some("hand_srv".to_owned());
        spec.python_args = Some(vec!["--utc".to_owned()]);
        spec.pip_dependencies = Some(vec!["Needed<1.5".to_owned()]);
        let (lock, folder) = bench.install(&spec).await;
        assert_eq!((lock.name.as_str(), lock.version.as_str()), ("hand_srv", "1.1.0"), "{installer:?}");
        let text = &lock.files["requirements.txt"];
        assert!(
            text.contains("\nhand-srv==1.1.0 \\\n    --hash=sha256:") && text.contains("\nneeded==1.0 \\\n"),
            "{text}"
        );
        assert_eq!(lock.python, bench.managers.target(Runtime::Python).await);

        let (command, args) = bench.entry(&spec, "", &[], &folder).unwrap();
        assert_eq!(command, "packages/x/bin/python");
        assert_eq!(args, ["-u", "-m", "hand_srv", "--utc"]);
        let answer = ask_server(&folder.join("bin/python"), &["-u", "-m", "hand_srv"], &folder);
        assert!(answer.contains(r#""version": "1.1.0""#), "{answer}");
        let compiled = walk(&folder).into_iter().any(|path| path.ends_with(".pyc"));
        assert!(compiled, "{installer:?} left it to the first start to compile");

        let (command, args) = bench.entry(&spec, "hand-srv", &["-v"], &folder).unwrap();
        assert_eq!((command.as_str(), args), ("packages/x/bin/hand-srv", vec!["-v".to_owned()]));
        let answer = ask_server(&folder.join("bin/hand-srv"), &[], &folder);
        assert!(answer.contains(r#""version": "1.1.0""#), "{answer}");

        let exact = bench.resolve(&python("Hand-Srv", Some("1.0.0"))).await.unwrap();
        assert_eq!((exact.name.as_str(), exact.version.as_str()), ("Hand-Srv", "1.0.0"));
        assert_eq!(bench.latest(Runtime::Python, "hand-srv").await.unwrap(), "1.1.0");
    }
}

fn walk(folder: &Path) -> Vec<String> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap().flatten() {
        match entry.file_type().unwrap().is_dir() {
            true => found.extend(walk(&entry.path())),
            false => found.push(entry.path().to_str().unwrap().to_owned()),
        }
    }
    found
}

fn benches() -> impl Iterator<Item = (Installer, Bench)> {
    benches_with(Bounds::default())
}

fn benches_with(bounds: Bounds) -> impl Iterator<Item = (Installer, Bench)> {
    [Installer::Uv, Installer::Pip].into_iter().map(move |one| (one, Bench::with(one, bounds)))
}

fn plain(bench: &Bench, name: &str, version: &str, wheel: Wheel<'_>) {
    bench.registry.add_wheel(name, version, &[(&format!("{}.py", name.replace('-', "_")), "")], wheel);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_registry_does_not_have() {
    for (installer, bench) in benches() {
        plain(&bench, "plain", "1.0", Wheel::default());
        plain(&bench, "plain", "1.1", Wheel::default());
        plain(&bench, "orphan", "1.0", Wheel { requires: &["no-such-zz"], ..Wheel::default() });
        plain(&bench, "future", "1.0", Wheel { requires_python: Some(">=3.99"), ..Wheel::default() });
        plain(&bench, "source", "1.0", Wheel { source_only: true, ..Wheel::default() });
        // As real registries are: there is a source of everything, and old versions are for old Pythons.
        for version in ["1.0", "1.2"] {
            plain(&bench, "plain", version, Wheel { source_only: true, ..Wheel::default() });
        }
        for version in ["0.8", "0.9"] {
            let wheel = Wheel { requires_python: Some("<3"), ..Wheel::default() };
            plain(&bench, "plain", version, wheel);
        }
        plain(&bench, "against", "1.0", Wheel { requires: &["plain<1.1"], ..Wheel::default() });
        let with = |name: &str, dependency: &str| PackageSpec {
            pip_dependencies: Some(vec![dependency.to_owned()]),
            ..python(name, None)
        };
        for (spec, code, message) in [
            (python("No_Such", None), ErrorCode::PackageNotFound, "The registry has no package "),
            (python("plain", Some("9.9")), ErrorCode::VersionNotFound, "The registry has no plain@9.9"),
            (with("plain", "no-such"), ErrorCode::PackageNotFound, "The registry does not have no-such"),
            (
                python("orphan", None),
                ErrorCode::InstallFailed,
                "orphan needs no-such-zz, which the registry does not have",
            ),
            (
                python("future", None),
                ErrorCode::InstallFailed,
                "future or something that it needs is for another",
            ),
            (
                python("source", None),
                ErrorCode::InstallFailed,
                "source or something that it needs has no ready-made",
            ),
            (
                with("against", "plain>=1.1"),
                ErrorCode::InstallFailed,
                "What against needs contradicts itself",
            ),
        ] {
            let error = bench.resolve(&spec).await.unwrap_err();
            assert_eq!(error.code, code, "{installer:?}: {error:?}");
            assert!(error.message.starts_with(message), "{installer:?}: {error:?}");
            assert!(
                !details(&error).is_empty()
                    && !details(&error).contains(bench.folder.path().to_str().unwrap())
            );
        }
        let error = bench.latest(Runtime::Python, "no-such").await.unwrap_err();
        assert_eq!(error.code, ErrorCode::PackageNotFound, "{installer:?}: {error:?}");
        // Withdrawn since it was locked.
        let lock = bench.resolve(&python("plain", None)).await.unwrap();
        bench.registry.remove("plain");
        plain(&bench, "plain", "2.0", Wheel::default());
        let error = bench.build(&lock).await.unwrap_err();
        assert_eq!(error.code, ErrorCode::VersionNotFound, "{installer:?}: {error:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_that_is_ill_may_recover() {
    for (installer, bench) in benches() {
        plain(&bench, "plain", "1.0", Wheel::default());
        let lock = bench.resolve(&python("plain", None)).await.unwrap();
        for fault in [Fault::Down, Fault::Status(503), Fault::Garbage] {
            bench.registry.fault(fault);
            for error in [
                bench.resolve(&python("plain", Some("1.0"))).await.unwrap_err(),
                bench.build(&lock).await.unwrap_err(),
                bench.latest(Runtime::Python, "plain").await.unwrap_err(),
            ] {
                assert_eq!(error.code, ErrorCode::RegistryUnavailable, "{installer:?} {fault:?}: {error:?}");
            }
        }
        bench.registry.fault(Fault::None);
        bench.install(&python("plain", None)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_breaks_off_is_not_installed() {
    for (installer, bench) in benches() {
        plain(&bench, "plain", "1.0", Wheel::default());
        let lock = bench.resolve(&python("plain", None)).await.unwrap();
        bench.registry.fault(Fault::Broken);
        let error = bench.build(&lock).await.unwrap_err();
        // pip does not tell a short file from a changed one.
        let code = match installer {
            Installer::Pip => ErrorCode::IntegrityMismatch,
            Installer::Uv => ErrorCode::RegistryUnavailable,
        };
        assert_eq!(error.code, code, "{installer:?}: {error:?}");
        bench.registry.fault(Fault::None);
        bench.build(&lock).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn other_bytes_than_were_locked_are_refused() {
    for (installer, bench) in benches() {
        plain(&bench, "plain", "1.0", Wheel::default());
        let lock = bench.resolve(&python("plain", None)).await.unwrap();
        bench.registry.fault(Fault::Corrupt);
        let error = bench.build(&lock).await.unwrap_err();
        assert_eq!(error.code, ErrorCode::IntegrityMismatch, "{installer:?}: {error:?}");
        // The registry has other bytes now, with their own right hash.
        bench.registry.fault(Fault::None);
        bench.registry.remove("plain");
        bench.registry.add_python("plain", "1.0", &[("plain.py", "evil")]);
        let error = bench.build(&lock).await.unwrap_err();
        assert_eq!(error.code, ErrorCode::IntegrityMismatch, "{installer:?}: {error:?}");
        // The same on another Python than it was resolved for is said as what it is.
        let mut other = lock.clone();
        other.python = Some("3.7".to_owned());
        let text = other.files.get_mut("requirements.txt").unwrap();
        *text = format!("# Resolved for Python 3.7, linux sparc\n{}", text.split_once('\n').unwrap().1);
        let error = bench.build(&other).await.unwrap_err();
        assert_eq!(error.code, ErrorCode::InstallFailed, "{installer:?}: {error:?}");
        assert!(
            error
                .message
                .starts_with("plain@1.0 was resolved for Python 3.7, linux sparc, and this worker has")
        );
        // A lock that says more than versions and hashes.
        for line in ["--index-url http://127.0.0.1:1/", "plain==1.0", "-e .", "x @ file:///etc"] {
            let mut changed = lock.clone();
            changed.files.get_mut("requirements.txt").unwrap().push_str(&format!("{line}\n"));
            assert_eq!(bench.build(&changed).await.unwrap_err().code, ErrorCode::InstallFailed, "{line}");
        }
    }
}

/// Pip's lock is uv's to build, and the other way round.
#[tokio::test(flavor = "multi_thread")]
async fn locks_are_of_no_installer() {
    for (makes, builds) in [(Installer::Uv, Installer::Pip), (Installer::Pip, Installer::Uv)] {
        let mut bench = Bench::with(makes, Bounds::default());
        publish(&bench.registry, "1.0.0");
        bench.registry.add_python("needed", "1.0", &[("needed.py", "")]);
        let lock = bench.resolve(&python("hand-srv", None)).await.unwrap();
        let other = Bench::with(builds, Bounds::default());
        bench.managers = Managers::with(&bench.settings, other.environment.clone(), Bounds::default());
        let folder = bench.build(&lock).await.unwrap();
        let answer = ask_server(&folder.join("bin/python"), &["-m", "hand_srv"], &folder);
        assert!(answer.contains("1.0.0"), "{answer}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn warnings_fail_only_who_wants_that() {
    for (installer, bench) in benches() {
        plain(&bench, "fine", "1.0", Wheel::default());
        plain(&bench, "yanked", "1.0", Wheel { yanked: true, ..Wheel::default() });
        for name in ["fine", "yanked"] {
            let mut spec = python(name, Some("1.0"));
            bench.resolve(&spec).await.unwrap();
            spec.fail_on_warning = true;
            match bench.resolve(&spec).await {
                Ok(_) => assert_eq!(name, "fine", "{installer:?}"),
                Err(error) => {
                    assert_eq!(error.code, ErrorCode::InstallWarnings, "{installer:?}: {error:?}");
                    assert!(name == "yanked" && details(&error).contains("yanked"), "{error:?}");
                }
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn sources_are_built_only_where_that_was_allowed() {
    for (installer, bench) in benches() {
        let mark = bench.folder.path().join("ran");
        let setup = format!("open({mark:?}, 'w').close()\nraise SystemExit('boom building')\n");
        let wheel = Wheel { source_only: true, ..Wheel::default() };
        bench.registry.add_wheel("source", "1.0", &[("setup.py", &setup)], wheel);
        let mut spec = python("source", None);
        assert!(bench.resolve(&spec).await.unwrap_err().message.contains("allowScripts"));
        assert!(!mark.exists(), "{installer:?} ran the package's code");
        spec.allow_scripts = true;
        let error = bench.resolve(&spec).await.unwrap_err();
        assert_eq!(error.code, ErrorCode::InstallFailed, "{installer:?}: {error:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn commands_and_modules_are_there() {
    let bench = Bench::with(Installer::Uv, Bounds::default());
    bench.registry.add_wheel(
        "many",
        "1.0",
        &[("pkg/__init__.py", ""), ("pkg/run.py", ""), ("pkg/sub/__main__.py", ""), ("single.py", "")],
        Wheel { scripts: &[("many-cli", "single:main")], ..Wheel::default() },
    );
    let mut spec = python("many", None);
    let (_, folder) = bench.install(&spec).await;
    for (module, found) in [
        ("pkg.run", true),
        ("pkg.sub", true),
        ("single", true),
        ("http.server", true),
        ("pkg", false),
        ("pkg.none", false),
        ("nothing", false),
        ("a-b", false),
    ] {
        spec.python_module = Some(module.to_owned());
        match bench.entry(&spec, "", &[], &folder) {
            Ok((_, args)) => assert!(found && args == ["-u", "-m", module], "{module}"),
            Err(error) => {
                assert_eq!((error.code, found), (ErrorCode::NoEntryPoint, false), "{module}: {error:?}");
                assert!(module == "a-b" || error.message.contains("many-cli"), "{error:?}");
            }
        }
    }
    for (command, becomes) in [
        ("many-cli", Some("packages/x/bin/many-cli")),
        ("packages/python/old/bin/many-cli", Some("packages/x/bin/many-cli")),
        ("python", Some("packages/x/bin/python")),
        ("/bin/sh", Some("/bin/sh")),
        ("node", Some("node")),
        ("no-such-program", None),
        ("/no/such/program", None),
        ("..", None),
    ] {
        match bench.entry(&spec, command, &["-v"], &folder) {
            Ok((command, args)) => assert_eq!((Some(command.as_str()), args.len()), (becomes, 1)),
            Err(error) => assert_eq!((error.code, becomes), (ErrorCode::NoEntryPoint, None), "{error:?}"),
        }
    }
    spec.python_module = None;
    assert_eq!(bench.entry(&spec, "", &[], &folder).unwrap_err().code, ErrorCode::NoEntryPoint);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_that_hangs_is_not_waited_for() {
    let short = Duration::from_millis(1_500);
    for (installer, bench) in benches_with(Bounds { silence: short, latest: short, ..Bounds::default() }) {
        plain(&bench, "plain", "1.0", Wheel::default());
        bench.registry.fault(Fault::Hang);
        let error = bench.resolve(&python("plain", None)).await.unwrap_err();
        assert_eq!(error.code, ErrorCode::InstallTimeout, "{installer:?}: {error:?}");
        let error = bench.latest(Runtime::Python, "plain").await.unwrap_err();
        assert_eq!(error.code, ErrorCode::RegistryUnavailable, "{installer:?}: {error:?}");
        bench.cancelled.cancel();
        let error = bench.resolve(&python("plain", None)).await.unwrap_err();
        assert_eq!(error.code, ErrorCode::Cancelled, "{installer:?}: {error:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn indexes_are_those_of_the_package_or_else_of_the_operator() {
    for (installer, bench) in benches() {
        let (own, extra) = (Registry::start(), Registry::start());
        plain(&bench, "plain", "9.0", Wheel::default());
        let wheel = |registry: &Registry, name: &str, version: &str| {
            registry.add_python(name, version, &[(&format!("{name}.py"), "")]);
        };
        wheel(&own, "plain", "1.0");
        wheel(&extra, "plain", "1.1");
        let mut spec = python("plain", None);
        spec.pip_index_url = Some(own.pip_url());
        assert_eq!(bench.install(&spec).await.0.version, "1.0", "{installer:?}");
        spec.pip_extra_index_url = Some(extra.pip_url());
        let (lock, _) = bench.install(&spec).await;
        assert_eq!((lock.version.as_str(), &lock.pip_index_url), ("1.1", &Some(own.pip_url())));
        // The operator's may have a password, which stays out of everything.
        let settings = PackageSettings {
            pip_index_url: Some(bench.registry.pip_url().replace("http://", "http://user:canary@").into()),
            ..bench.settings.clone()
        };
        let mut bench = bench;
        bench.managers = Managers::with(&settings, bench.environment.clone(), Bounds::default());
        let (lock, _) = bench.install(&python("plain", None)).await;
        assert_eq!(lock.version, "9.0");
        bench.registry.fault(Fault::Down);
        let error = bench.resolve(&python("plain", None)).await.unwrap_err();
        let said = bench.said.lock().unwrap().join("\n");
        let all = format!("{said}{lock:?}{error:?}");
        assert!(!all.contains("canary"), "{installer:?}: {all}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn names_and_versions_are_held_to_their_grammar() {
    let bench = Bench::new();
    for name in ["-r", "--index-url=http://x", "a @ http://x", "./a", "git+ssh://x", "", "a;b"] {
        let error = bench.resolve(&python(name, None)).await.unwrap_err();
        assert_eq!(error.code, ErrorCode::InvalidPackageName, "{name}");
        let error = bench.latest(Runtime::Python, name).await.unwrap_err();
        assert_eq!(error.code, ErrorCode::InvalidPackageName, "{name}");
    }
    let mut spec = python("plain", Some("latest"));
    assert_eq!(bench.resolve(&spec).await.unwrap_err().code, ErrorCode::InvalidVersion);
    spec.version = None;
    spec.pip_dependencies = Some(vec!["-r x".to_owned()]);
    assert_eq!(bench.resolve(&spec).await.unwrap_err().code, ErrorCode::InvalidRequest);
    spec.pip_dependencies = None;
    spec.pip_index_url = Some("http://169.254.169.254/".to_owned());
    assert_eq!(bench.resolve(&spec).await.unwrap_err().code, ErrorCode::InvalidRequest);
    assert!(bench.registry.requests().is_empty());
    // A Python that is none.
    let mut bench = bench;
    let settings = PackageSettings { python_bin: Some("/bin/false".into()), ..bench.settings.clone() };
    bench.managers = Managers::with(&settings, bench.environment.clone(), Bounds::default());
    assert_eq!(bench.resolve(&python("plain", None)).await.unwrap_err().code, ErrorCode::RuntimeMissing);
    assert_eq!(bench.managers.target(Runtime::Python).await, None);
}
