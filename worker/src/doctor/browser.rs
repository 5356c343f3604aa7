//! The browser of the built-in tools: not whether it is there, but whether it shows a page, and in its sandbox.

use std::{fs, path::Path};

use mcp_shared::{
    config::{BrowserChoice, RemoteSettings, Sandbox, WebToolSettings},
    doctor::{Area, Finding},
    error::shorten,
};

use crate::builtin::{browser, trial};

const WHAT: &str = "chromium";
/// Characters of what it says itself.
const SAID: usize = 600;
/// Settings of the kernel that keep a program from making a user namespace, which the sandbox begins with: where each
/// stands, the value that does so, and what allows it.
const FORBIDDING: [(&str, &str, &str); 3] = [
    ("kernel/unprivileged_userns_clone", "0", "set kernel.unprivileged_userns_clone=1"),
    (
        "kernel/apparmor_restrict_unprivileged_userns",
        "1",
        "give it a profile of AppArmor that allows userns, or set kernel.apparmor_restrict_unprivileged_userns=0",
    ),
    ("user/max_user_namespaces", "0", "raise user.max_user_namespaces"),
];

/// Tries it out. Tools do without one, and say so, so that nothing here is an error.
pub async fn look(settings: &RemoteSettings) -> Finding {
    let web_tools = &settings.web_tools;
    let program = match browser::program(&web_tools.browser) {
        Ok(program) => program,
        Err(why) => return Finding::ok(Area::Runtimes, WHAT, format!("{why}; pages are not rendered")),
    };
    let sandboxed = match browser::sandboxed(web_tools.sandbox) {
        Ok(sandboxed) => sandboxed,
        Err(why) => {
            return Finding::warning(
                Area::Runtimes,
                WHAT,
                format!("{why}; pages are not rendered"),
                "run this program as another user, or set CHROMIUM_SANDBOX=auto",
            );
        }
    };
    let tried = trial::run(settings, &program, sandboxed).await;
    let set = |name: &str| {
        let value = fs::read_to_string(Path::new("/proc/sys").join(name)).ok()?;
        Some(value.trim().to_owned())
    };
    judge(web_tools, sandboxed, tried, set)
}

/// What a trial means. `set` says what the kernel is set to.
fn judge(
    settings: &WebToolSettings,
    sandboxed: bool,
    tried: Result<String, String>,
    set: impl Fn(&str) -> Option<String>,
) -> Finding {
    let why = match tried {
        Ok(version) if sandboxed => {
            return Finding::ok(Area::Runtimes, WHAT, format!("{version}, in its sandbox"));
        }
        Ok(version) => {
            // Every node that runs servers has keys, and if it has not, it makes them at its first start.
            let text = format!(
                "{version}, without its sandbox: a page that takes it over is a program beside the keys of this one"
            );
            let remedy = if settings.sandbox == Sandbox::Never {
                "set CHROMIUM_SANDBOX=auto; a container that keeps it from its sandbox is to be started with \
                 compose/chromium.yaml"
            } else {
                "run this program as another user than root"
            };
            return Finding::warning(Area::Runtimes, WHAT, text, remedy);
        }
        Err(why) => why,
    };
    let about = why.to_ascii_lowercase();
    if sandboxed && (about.contains("sandbox") || about.contains("namespace")) {
        let text =
            format!("it cannot make its sandbox, so that pages are not rendered ({})", shorten(&why, SAID));
        return Finding::warning(Area::Runtimes, WHAT, text, let_it(set));
    }
    let remedy = match settings.browser {
        BrowserChoice::Program(_) => "correct CHROMIUM, or have the one that it names repaired",
        _ => "have it repaired, name another one in CHROMIUM, or set CHROMIUM=none",
    };
    let text = format!("it does not work, so that pages are not rendered ({})", shorten(&why, SAID));
    Finding::warning(Area::Runtimes, WHAT, text, remedy)
}

/// What lets it make its sandbox.
fn let_it(set: impl Fn(&str) -> Option<String>) -> String {
    let forbids = |(name, value, _): &&(&str, &str, &str)| set(name).is_some_and(|found| found == *value);
    let ways: Vec<&str> = FORBIDDING.iter().filter(forbids).map(|(_, _, way)| *way).collect();
    let container = "in a container, start that with compose/chromium.yaml, whose seccomp profile lets it make a user \
                     namespace";
    if ways.is_empty() {
        return format!(
            "{container}; elsewhere see to kernel.unprivileged_userns_clone=1 and \
             kernel.apparmor_restrict_unprivileged_userns=0 (or a profile for it), or run it as a user that may"
        );
    }
    format!("{}; and {container}", ways.join("; "))
}

#[cfg(test)]
mod tests {
    use mcp_shared::doctor::Level;

    use super::*;

    const NO_SANDBOX: &str = "the browser is gone: [7:7:1124/034512.1:FATAL:content/browser/zygote_host/\
                              zygote_host_impl_linux.cc:128] No usable sandbox! If you are running on Ubuntu 23.10+ ...";

    fn judged(
        settings: &WebToolSettings,
        sandboxed: bool,
        tried: Result<&str, &str>,
        set: &[(&str, &str)],
    ) -> (Level, String, String) {
        let tried = tried.map(str::to_owned).map_err(str::to_owned);
        let found = judge(settings, sandboxed, tried, |name| {
            set.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned())
        });
        (found.level, found.text, found.remedy.unwrap_or_default())
    }

    #[test]
    fn a_browser_that_cannot_make_its_sandbox_is_not_well() {
        let auto = WebToolSettings::default();
        let (level, text, remedy) = judged(&auto, true, Err(NO_SANDBOX), &[]);
        assert_eq!(level, Level::Warning);
        assert!(text.contains("cannot make its sandbox") && text.contains("No usable sandbox!"), "{text}");
        for way in [
            "compose/chromium.yaml",
            "kernel.unprivileged_userns_clone=1",
            "kernel.apparmor_restrict_unprivileged_userns=0",
        ] {
            assert!(remedy.contains(way), "{remedy}");
        }
        // What this machine is set to comes first, and alone but for containers.
        let set = [
            ("kernel/unprivileged_userns_clone", "1"),
            ("kernel/apparmor_restrict_unprivileged_userns", "1"),
            ("user/max_user_namespaces", "63000"),
        ];
        let (_, _, remedy) = judged(&auto, true, Err(NO_SANDBOX), &set);
        assert!(remedy.starts_with("give it a profile of AppArmor"), "{remedy}");
        assert!(!remedy.contains("unprivileged_userns_clone") && !remedy.contains("max_user"), "{remedy}");
        // Nobody is told to do without.
        assert!(!remedy.contains("CHROMIUM_SANDBOX"), "{remedy}");
    }

    #[test]
    fn a_browser_without_its_sandbox_is_not_well_either() {
        let auto = WebToolSettings::default();
        let never = WebToolSettings { sandbox: Sandbox::Never, ..WebToolSettings::default() };
        let (level, text, remedy) = judged(&never, false, Ok("Chrome/143"), &[]);
        assert_eq!(level, Level::Warning);
        assert!(text.starts_with("Chrome/143, without its sandbox") && text.contains("keys"), "{text}");
        assert!(remedy.contains("CHROMIUM_SANDBOX=auto") && !remedy.contains("kernel."), "{remedy}");
        let (level, _, remedy) = judged(&auto, false, Ok("Chrome/143"), &[]);
        assert_eq!((level, remedy.as_str()), (Level::Warning, "run this program as another user than root"));
        let (level, text, _) = judged(&auto, true, Ok("Chrome/143"), &[]);
        assert_eq!((level, text.as_str()), (Level::Ok, "Chrome/143, in its sandbox"));
        // What has nothing to do with it is not blamed on it.
        for (settings, sandboxed, why) in [
            (&never, false, NO_SANDBOX),
            (&auto, true, "the browser is gone: libnss3.so: cannot open shared object file"),
        ] {
            let (level, text, remedy) = judged(settings, sandboxed, Err(why), &[]);
            assert_eq!(level, Level::Warning);
            assert!(
                text.starts_with("it does not work") && remedy.contains("CHROMIUM=none"),
                "{text}: {remedy}"
            );
        }
    }
}
