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
