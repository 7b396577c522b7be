//! Models of the Hugging Face hub, fetched from a small one of our own.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

use serde_json::json;

use crate::world::{SMALL, World};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// A hub with one repository, `org/name`.
struct Hub {
    address: String,
    /// The requests so far: path, and where they began.
    asked: Arc<Mutex<Vec<(String, usize)>>>,
}

/// What the hub gives for a file: its bytes, and what it calls them.
type Files = BTreeMap<String, (Vec<u8>, String)>;

impl Hub {
    /// Serves files; those of the second list break off in the middle once.
    fn of(files: Files, mut broken: Vec<&'static str>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let asked = Arc::new(Mutex::new(Vec::new()));
        let log = asked.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let Ok(mut stream) = stream else { continue };
                let Some((path, from, to)) = request(&stream) else { continue };
                log.lock().unwrap().push((path.clone(), from));
                let head = "connection: close\r\nx-repo-commit: ".to_owned() + COMMIT;
                if path.starts_with("/api/models/org/name") {
                    let listed: Vec<_> = files.keys().map(|name| json!({ "rfilename": name })).collect();
                    let body = json!({ "siblings": listed, "sha": COMMIT }).to_string();
                    let length = body.len();
                    let _ = write!(stream, "HTTP/1.1 200 OK\r\n{head}\r\ncontent-length: {length}\r\n\r\n{body}");
                    continue;
                }
                let name = path.strip_prefix("/org/name/resolve/main/").unwrap_or_default();
                let Some((bytes, etag)) = files.get(name) else {
                    let _ = write!(stream, "HTTP/1.1 404 Not Found\r\n{head}\r\ncontent-length: 0\r\n\r\n");
                    continue;
                };
                let all = bytes.len();
                let part = &bytes[from.min(all)..to.map_or(all, |to| all.min(to + 1))];
                let range = format!("content-range: bytes {from}-{}/{all}", from + part.len().max(1) - 1);
                let length = part.len();
                let _ = write!(
                    stream,
                    "HTTP/1.1 206 Partial Content\r\n{head}\r\netag: \"{etag}\"\r\n{range}\r\ncontent-length: {length}\r\n\r\n"
                );
                match broken.iter().position(|other| *other == name && to.is_none()) {
                    Some(at) => {
                        broken.remove(at);
                        let _ = stream.write_all(&part[..length / 2]);
                    }
                    None => drop(stream.write_all(part)),
                }
            }
        });
        Self { address, asked }
    }

    fn run(&self, world: &World, args: &[&str]) -> (Option<i32>, String, String) {
        let mut command = world.command(args);
        command.env("HF_HOME", "cache").env_remove("HF_HUB_CACHE").env("HF_ENDPOINT", &self.address);
        let output = command.env("HF_TOKEN", "secret-of-mine").output().unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let (out, err) = (text(&output.stdout), text(&output.stderr));
        assert!(!out.contains("secret-of-mine") && !err.contains("secret-of-mine"), "{out}{err}");
        (output.status.code(), out, err)
    }
}

/// The path of a request, and the range of bytes that it asks for.
fn request(stream: &TcpStream) -> Option<(String, usize, Option<usize>)> {
    let mut lines = BufReader::new(stream).lines().map_while(Result::ok);
    let path = lines.next()?.split(' ').nth(1)?.to_owned();
    let mut range = (0, None);
    for line in lines.take_while(|line| !line.is_empty()) {
        if let Some(bytes) = line.to_lowercase().strip_prefix("range: bytes=") {
            let (from, to) = bytes.split_once('-')?;
            range = (from.parse().ok()?, to.parse().ok());
        }
    }
    Some((path, range.0, range.1))
}

#[test]
fn a_model_is_fetched_once_goes_on_where_it_broke_off_and_is_verified() {
    let world = World::new(&SMALL.replace("[data.markov]\nstates = 6", "[data.text]\npaths = [\"text.txt\"]"));
    std::fs::write(world.dir.path().join("text.txt"), "the cat sat on the mat. ".repeat(80)).unwrap();
    world.succeeds(&["train", "recipe.toml", "--out", "run"]);
    world.succeeds(&["export", "run", "--out", "exported"]);
    let sha = |bytes: &[u8]| {
        use sha2::Digest;
        sha2::Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect::<String>()
    };
    let mut files = Files::new();
    for entry in std::fs::read_dir(world.dir.path().join("exported")).unwrap() {
        let entry = entry.unwrap();
        let bytes = std::fs::read(entry.path()).unwrap();
        let etag = sha(&bytes);
        files.insert(entry.file_name().into_string().unwrap(), (bytes, etag));
    }
    files.insert("../evil.json".into(), (b"{}".to_vec(), "e".into()));
    files.insert("pytorch_model.bin".into(), (b"pickle".to_vec(), "b".into()));
    let hub = Hub::of(files.clone(), vec!["model.safetensors"]);
    let greedy = ["--prompt", "the ", "--temperature", "0", "--max-new-tokens", "8"];
    let (code, _, err) = hub.run(&world, &[&["generate", "org/name"], &greedy[..]].concat());
    assert!(code == Some(2) && err.contains("--download"), "{err}");
    assert!(hub.asked.lock().unwrap().is_empty(), "nothing is asked without --download");
    let fetch = [&["generate", "org/name", "--download"], &greedy[..]].concat();
    let (code, out, err) = hub.run(&world, &fetch);
    assert_eq!((code, &out), (Some(0), &world.succeeds(&[&["generate", "run"], &greedy[..]].concat()).0), "{err}");
    let asked = hub.asked.lock().unwrap().clone();
    let of =
        |name: &str| asked.iter().filter(|(path, _)| path.ends_with(name)).map(|(_, from)| *from).collect::<Vec<_>>();
    assert!(of("model.safetensors").iter().any(|&from| from > 0), "goes on where it broke off: {asked:?}");
    assert!(of(".bin").is_empty() && of("evil.json").is_empty(), "{asked:?}");
    let (code, _, _) = hub.run(&world, &fetch);
    assert_eq!((code, hub.asked.lock().unwrap().len()), (Some(0), asked.len()), "what is there is not fetched again");

    // What is not what the hub says is not kept, and names that lead elsewhere are not followed.
    std::fs::remove_dir_all(world.dir.path().join("cache")).unwrap();
    for (etag, words) in [("0".repeat(64), "not what the hub has"), ("../../../x".into(), "no hash")] {
        let mut wrong = files.clone();
        wrong.get_mut("model.safetensors").unwrap().1 = etag;
        let (code, _, err) = Hub::of(wrong, Vec::new()).run(&world, &fetch);
        assert!(code == Some(1) && err.contains(words), "{err}");
        assert!(
            !world
                .dir
                .path()
                .join("cache/hub/models--org--name/snapshots")
                .join(COMMIT)
                .join("model.safetensors")
                .exists()
        );
    }
    let (code, _, err) = hub.run(&world, &["generate", "org/other", "--download"]);
    assert!(code == Some(1) && err.contains("org/other: cannot be fetched") && err.contains("hint"), "{err}");
    let gone = Hub { address: "http://127.0.0.1:9".into(), asked: Arc::default() };
    let (code, _, err) = gone.run(&world, &["generate", "org/other", "--download"]);
    assert!(code == Some(1) && err.contains("HF_ENDPOINT"), "{err}");
}
