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
