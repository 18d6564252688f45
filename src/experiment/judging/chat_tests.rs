use std::{
    cell::{Cell, RefCell},
    collections::BTreeMap,
    hash::{DefaultHasher, Hash, Hasher},
    net::TcpListener,
    time::Instant,
};

use serde_json::json;
use ureq::http::{HeaderMap, HeaderValue, header};

use super::{
    fake::{Reply, Seen, Server, chat, http, say},
    *,
};

const SECRET: &str = "sk-secret/0123456789+abcdef=";

fn endpoint(server: &Server) -> Endpoint {
    let mut endpoint = Endpoint::new(server.url(), "judge-1");
    endpoint.backoff = Duration::from_millis(2);
    endpoint.key = Some(Key(SECRET.to_owned()));
    endpoint
}

fn right_answer(question: &str) -> String {
    format!("{question}\n\"{}\" é", question.len())
}

fn question(user: impl Into<String>) -> Question {
    Question { system: None, user: user.into() }
}

/// `n` questions, "0" and on.
fn ask(endpoint: &Endpoint, n: usize) -> Result<(BTreeMap<usize, Answer>, Tally)> {
    let mut answers = BTreeMap::new();
    let tally =
        endpoint.ask_all(&mut (0..n).map(|i| question(i.to_string())), &mut |i, answer| {
            assert!(answers.insert(i, answer).is_none(), "question {i} came twice");
            Ok(())
        })?;
    let answered = answers.values().filter(|answer| answer.is_ok()).count() as u64;
    assert_eq!((tally.asked, tally.answered), (n as u64, answered));
    assert_eq!(tally.asked, tally.answered + tally.failed);
    assert!(answers.keys().copied().eq(0..n));
    Ok((answers, tally))
}

/// The fault of a question's try, on one try in five and never from the fifth on.
fn fault(seen: &Seen) -> Option<Reply> {
    let mut hasher = DefaultHasher::new();
    (seen.question(), seen.before).hash(&mut hasher);
    let answer = http(200, "", &chat("wrong"));
    let (ok, middle) = (|body: &str| Reply::Send(200, "", body.into()), answer.len() / 2);
    if seen.before >= 4 {
        return None;
    }
    Some(match hasher.finish() % 50 {
        0 => Reply::Silence,
        1 => Reply::Send(429, "Retry-After: 0\r\n", "slow down".into()),
        2 => Reply::Send(500, "", "{}".into()),
        3 => ok("{\"choices\": [{\"message\": {\"content\": \"wro"),
        4 => ok("<html>wrong</html>"),
        5 => Reply::Break(Vec::new()),
        6 => Reply::Break(answer[..middle].to_vec()),
        7 => Reply::Break(answer[..answer.len() - 3].to_vec()),
        8 => ok(r#"{"choices": [{"message": {"content": null}, "finish_reason": "length"}]}"#),
        9 => ok(r#"{"error": {"message": "overloaded"}}"#),
        _ => return None,
    })
}

#[test]
fn a_thousand_questions_survive_faults_on_one_try_in_five() {
    let server =
        Server::start(|seen| fault(seen).unwrap_or_else(|| say(&right_answer(seen.question()))));
    let mut endpoint = endpoint(&server);
    (endpoint.concurrency, endpoint.retries) = (16, 12);
    endpoint.timeout = Duration::from_millis(400);
    let (answers, tally) = ask(&endpoint, 1000).unwrap();
    for (index, answer) in answers {
        assert_eq!(answer.unwrap(), right_answer(&index.to_string()));
    }
    let faults = server.seen().iter().filter(|seen| fault(seen).is_some()).count() as u64;
    assert!((200..350).contains(&faults), "{faults} faults");
    // Tries that a busy machine makes too slow come on top.
    assert!(tally.retried >= faults);
    assert_eq!((tally.requests, tally.failed), (1000 + tally.retried, 0));
}

#[test]
fn a_request_is_what_the_interface_says() {
    let server = Server::start(|_| say(" yes "));
    let asked = Question { system: Some("Be \"brief\".".into()), user: "é?".into() };
    let mut answers = Vec::new();
    let tally = endpoint(&server).ask_all(&mut [asked].into_iter(), &mut |index, answer| {
        answers.push((index, answer));
        Ok(())
    });
    assert_eq!(answers, [(0, Ok(" yes ".to_owned()))]);
    assert_eq!(tally, Ok(Tally { asked: 1, answered: 1, failed: 0, requests: 1, retried: 0 }));
    let seen = &server.seen()[0];
    assert_eq!(seen.line, "POST /v1/chat/completions HTTP/1.1");
    assert_eq!(seen.headers["authorization"], format!("Bearer {SECRET}"));
    assert_eq!(seen.headers["content-type"], "application/json");
    let messages =
        json!([{"role": "system", "content": "Be \"brief\"."}, {"role": "user", "content": "é?"}]);
    let want =
        json!({"model": "judge-1", "messages": messages, "max_tokens": 256, "temperature": 0});
    assert_eq!(seen.body, want);
}

/// What the server does, and how the reason begins.
type GivenUp = (fn(&str) -> Reply, &'static str);

#[test]
fn what_always_fails_is_given_up_with_the_reason() {
    let long = format!("{}{}", chat("yes"), " ".repeat(1 << 20));
    let cases: [GivenUp; 7] = [
        (|_| Reply::Send(503, "Retry-After: 0.001\r\n", "{\"a\":\r\n1}".into()), "503: {\"a\":1}"),
        (|_| Reply::Send(429, "", String::new()), "429: (no text)"),
        (|_| Reply::Send(200, "", "no".into()), "the response is not JSON: no"),
        (|_| Reply::Send(200, "", "{\"choices\":[]}".into()), "no text in choices[0]"),
        (|_| Reply::Break(http(200, "", "{\"a\":1}")[..40].into()), "the response is cut short: "),
        (|long| Reply::Send(200, "", long.into()), "the response is longer than 1 MiB"),
        (|_| Reply::Silence, "not done within 40ms"),
    ];
    for (reply, want) in cases {
        let long = long.clone();
        let server = Server::start(move |_| reply(&long));
        let mut endpoint = endpoint(&server);
        endpoint.retries = 2;
        endpoint.timeout = Duration::from_millis(if want.contains("40ms") { 40 } else { 5000 });
        let (answers, tally) = ask(&endpoint, 4).unwrap();
        for answer in answers.into_values() {
            let Err(Failure::GaveUp { tries: 3, reason }) = answer else { panic!("{answer:?}") };
            assert!(reason.starts_with(want), "{reason:?} is not {want:?}");
        }
        assert_eq!((tally.requests, tally.retried, tally.failed), (12, 8, 4));
    }
    let (plain, closed) =
        (Server::start(|_| say("yes")), TcpListener::bind("127.0.0.1:0").unwrap());
    let nobody = format!("http://{}", closed.local_addr().unwrap());
    drop(closed);
    for (url, want) in [(nobody, "io: "), (plain.url().replace("http:", "https:"), "")] {
        let mut endpoint = Endpoint::new(url, "judge");
        endpoint.retries = 0;
        let failure = ask(&endpoint, 1).unwrap().0.remove(&0).unwrap().unwrap_err().to_string();
        assert!(failure.starts_with(&format!("no answer after 1 try: {want}")), "{failure}");
    }
}

#[test]
fn the_budget_counts_every_request() {
    for status in [200, 500] {
        let server = Server::start(move |_| Reply::Send(status, "", chat("yes")));
        let mut endpoint = endpoint(&server);
        (endpoint.concurrency, endpoint.retries, endpoint.max_requests) = (3, 9, Some(7));
        let (answers, tally) = ask(&endpoint, 10).unwrap();
        assert_eq!((tally.requests, server.seen().len()), (7, 7));
        assert_eq!(tally.answered, if status == 200 { 7 } else { 0 });
        let (mut tries, mut given_up) = (0, 0);
        for failure in answers.into_values().filter_map(Answer::err) {
            match failure {
                Failure::GaveUp { tries: sent, reason } => {
                    assert!(reason.contains("500: ") && reason.contains("budget"), "{reason}");
                    (tries, given_up) = (tries + sent, given_up + 1);
                }
                other => assert_eq!(other, Failure::Budget { max_requests: 7 }),
            }
        }
        assert_eq!(tries, if status == 200 { 0 } else { 7 });
        assert_eq!(tally.retried, u64::from(tries) - given_up);
    }
}

#[test]
fn what_rules_out_every_answer_stops_everything() {
    for status in [401, 402, 403, 404, 307] {
        let echo = |seen: &Seen| json!({"for": "x", "got": seen.headers["authorization"]});
        let server = Server::start(move |seen| {
            Reply::Send(status, "Location: /\r\n", echo(seen).to_string())
        });
        let mut endpoint = endpoint(&server);
        endpoint.concurrency = 2;
        let error = ask(&endpoint, 1000).unwrap_err().to_string();
        let body = r#"{"for":"x","got":"Bearer [key]"}"#;
        let want = format!("{}/chat/completions\n  got:      {status}: {body}\n", server.url());
        assert!(error.contains(&want), "{error}");
        assert!(server.seen().len() <= 2, "{} requests", server.seen().len());
    }
}

#[test]
fn no_text_holds_the_key() {
    let server = Server::start(|seen| {
        let key = &seen.headers["authorization"];
        let escaped = key.replace('/', "\\/").replace('=', "\\u003d");
        let json = format!("{{\"wrong\": \"{escaped}\"}}");
        match seen.question() {
            "0" => Reply::Send(400, "", format!("{}{key}", "x".repeat(190))),
            "1" => Reply::Send(400, "", json),
            "2" => Reply::Send(400, "", json!({"inner": key.replace('/', "\\/")}).to_string()),
            "3" => Reply::Send(400, "", format!("{key}, {}", key.replace('/', "\\/"))),
            "4" => Reply::Send(500, "", key.replace("23", "2\u{0}\r\n3")),
            "5" => Reply::Send(200, "", json),
            "6" => Reply::Break(http(400, "", key)[..60].to_vec()),
            "7" => Reply::Break(http(200, "", key)[..60].to_vec()),
            "8" => Reply::Break(format!("HTTP/1.1 {key}\r\n\r\n").into()),
            "9" => Reply::Send(200, "", key.clone()),
            _ => say(key),
        }
    });
    let mut endpoint = endpoint(&server);
    endpoint.retries = 0;
    let (answers, _) = ask(&endpoint, 11).unwrap();
    for answer in answers.values() {
        let text = format!("{answer:?}, {}", answer.clone().unwrap_or_else(|e| e.to_string()));
        assert!(!text.contains("sk-") && !text.contains("0123"), "{text}");
    }
    assert_eq!(answers[&10], Ok("Bearer [key]".to_owned()));
    assert!(!format!("{endpoint:?}").contains("sk-"));
}

#[test]
fn a_refused_question_is_not_asked_again() {
    let server = Server::start(|seen| match seen.question() {
        "1" => Reply::Send(400, "", "too long".into()),
        "2" => Reply::Send(422, "", "\n".repeat(300) + &"é".repeat(201)),
        _ => say("yes"),
    });
    let (answers, tally) = ask(&endpoint(&server), 4).unwrap();
    assert_eq!(answers[&1], Err(Failure::Refused { status: 400, body: "too long".into() }));
    assert_eq!(answers[&2], Err(Failure::Refused { status: 422, body: "é".repeat(200) + "…" }));
    assert_eq!((tally.answered, tally.failed, tally.requests), (2, 2, 4));
}

#[test]
fn an_error_or_panic_of_the_caller_ends_it_at_once() {
    // Only the first question is answered at once: the others would hang for 5 s or wait for 60 s.
    let server = Server::start(|seen| match seen.question() {
        "0" => say("yes"),
        "1" | "2" => Reply::Silence,
        _ => Reply::Send(503, "Retry-After: 900\r\n", String::new()),
    });
    let start = Instant::now();
    let endpoint = endpoint(&server);
    let full = Error::new("the disk is full");
    let mut endless = (0..).map(|i: u32| question(i.to_string()));
    let got = endpoint.ask_all(&mut endless, &mut |_, _| {
        thread::sleep(Duration::from_millis(50));
        Err(full.clone())
    });
    assert_eq!(got, Err(full));
    assert_eq!(endless.next(), Some(question("8")));
    let panic = std::panic::catch_unwind(|| {
        endpoint.ask_all(&mut [question("0")].into_iter(), &mut |_, _| panic!("on purpose"))
    });
    assert!(panic.is_err());
    assert!(start.elapsed() < Duration::from_secs(3));
    assert!(server.seen().len() <= 9);
}

#[test]
fn questions_are_pulled_in_order_and_no_more_than_can_be_asked() {
    let server = Server::start(|seen| {
        thread::sleep(Duration::from_millis(seen.question().parse::<u64>().unwrap() % 7));
        say(seen.question())
    });
    let mut endpoint = endpoint(&server);
    endpoint.concurrency = 5;
    let (pulled, most) = (Cell::new(0), Cell::new(0));
    let order = RefCell::new(Vec::new());
    let mut questions = (0..60).map(|i| {
        pulled.set(pulled.get() + 1);
        question(i.to_string())
    });
    let tally = endpoint.ask_all(&mut questions, &mut |index, answer| {
        assert_eq!(answer, Ok(index.to_string()));
        most.set(most.get().max(pulled.get() - order.borrow().len()));
        order.borrow_mut().push(index);
        Ok(())
    });
    assert_eq!(tally.unwrap().answered, 60);
    assert_eq!(most.get(), 5);
    let order = order.into_inner();
    assert!(!order.is_sorted(), "answers come as they are finished");
}

#[test]
fn the_workers_share_the_rate() {
    let server = Server::start(|seen| say(seen.question()));
    let mut endpoint = endpoint(&server);
    endpoint.per_minute = Some(1200);
    let start = Instant::now();
    ask(&endpoint, 7).unwrap();
    let took = start.elapsed();
    assert!((300..3000).contains(&took.as_millis()), "{took:?} for 7 requests 50 ms apart");
}

#[test]
fn waits_are_bounded() {
    let after = |value: &'static str| {
        let headers = [(header::RETRY_AFTER, HeaderValue::from_static(value))];
        wire::retry_after(&HeaderMap::from_iter(headers)).as_secs_f64()
    };
    assert_eq!(["0", " 2 ", "1.5", "900", "inf"].map(after), [0.0, 2.0, 1.5, 60.0, 60.0]);
    let nonsense = ["-3", "NaN", "soon", "Wed, 21 Oct 2026 07:28:00 GMT"];
    assert_eq!(nonsense.map(after), [0.0; 4]);
    let waits = |tries| (0..500).map(move |i| session::back_off(Duration::from_secs(1), i, tries));
    for (tries, most) in [(1, 1.0), (2, 2.0), (4, 8.0), (7, 60.0), (33, 60.0), (u32::MAX, 60.0)] {
        let mean = waits(tries).map(|wait| wait.as_secs_f64()).sum::<f64>() / 500.0;
        assert!((mean / most - 0.5).abs() < 0.05, "{tries} tries: mean {mean}");
        assert!(waits(tries).all(|wait| wait.as_secs_f64() <= most));
    }
    assert!(waits(3).eq(waits(3)));
}

#[test]
fn wrong_settings_are_named() {
    let change = |change: fn(&mut Endpoint)| {
        let mut endpoint = Endpoint::new("http://127.0.0.1:9/v1", "judge");
        change(&mut endpoint);
        endpoint.ask_all(&mut std::iter::empty(), &mut |_, _| Ok(())).map(|_| ())
    };
    assert_eq!(change(|_| ()), Ok(()));
    assert_eq!(change(|endpoint| endpoint.url = "https://[::1]:8000/v1///".into()), Ok(()));
    for url in ["", "127.0.0.1/v1", "ftp://host/v1", "http://", "https:///v1", "http://a b/"] {
        let mut endpoint = Endpoint::new(url, "judge");
        assert!(endpoint.check().unwrap_err().to_string().contains("URL is wrong"), "{url}");
        endpoint.url = format!("http://me:{SECRET}@host/{url}");
        assert!(!endpoint.check().unwrap_err().to_string().contains(SECRET));
    }
    assert!(change(|endpoint| endpoint.model = " ".into()).is_err());
    assert!(change(|endpoint| endpoint.concurrency = 0).is_err());
    assert!(change(|endpoint| endpoint.per_minute = Some(0)).is_err());
    assert!(change(|endpoint| endpoint.timeout = Duration::ZERO).is_err());
}

#[test]
fn keys_come_from_variables_and_files_and_are_never_shown() {
    let key = Key::from_env("CARGO_PKG_NAME").unwrap();
    assert_eq!((key.0.as_str(), format!("{key:?}")), ("inkling", "Key(..)".to_owned()));
    let missing = Key::from_env("INKLING_TEST_NO_SUCH_KEY").unwrap_err().to_string();
    assert!(missing.contains("INKLING_TEST_NO_SUCH_KEY"), "{missing}");
    let words = Key::from_env("CARGO_PKG_DESCRIPTION").unwrap_err().to_string();
    let description = env!("CARGO_PKG_DESCRIPTION").split(' ').next().unwrap();
    assert!(words.contains("CARGO_PKG_DESCRIPTION") && !words.contains(description), "{words}");

    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("key.txt");
    let from_file = |content: &[u8]| {
        std::fs::write(&path, content).unwrap();
        Key::from_file(&path).map(|key| key.0)
    };
    assert_eq!(from_file(b" sk-1\r\n"), Ok("sk-1".to_owned()));
    for content in [&b"\n"[..], b"sk-one\nsk-two", b"sk-\xff", b"sk-\"one\""] {
        let error = from_file(content).unwrap_err().to_string();
        assert!(error.contains("key.txt") && !error.contains("sk-"), "{error}");
    }
    let none = Key::from_file(&dir.path().join("none.txt")).unwrap_err().to_string();
    assert!(none.contains("none.txt"), "{none}");
}
