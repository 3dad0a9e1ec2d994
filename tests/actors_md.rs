//! `actors.md` is true: its actors, messages, reply types and the graph of who
//! asks whom are those of the code, read from the sources as the compiler does.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use proc_macro2::{TokenStream, TokenTree};
use quote::ToTokens;
use syn::visit::{self, Visit};

/// What the sources say.
#[derive(Default)]
struct Code {
    /// Actor → the module it is in.
    actors: BTreeMap<String, String>,
    /// Message → reply type.
    replies: BTreeMap<String, String>,
    /// (actor, message).
    handles: BTreeSet<(String, String)>,
    /// (module, message): a port held, or a query made, there.
    asks: BTreeSet<(String, String)>,
}

struct Reader<'a> {
    module: String,
    code: &'a mut Code,
}

fn last_of(path: &syn::Path) -> &syn::PathSegment {
    path.segments.last().expect("a path has a segment")
}

fn argument(segment: &syn::PathSegment) -> Option<String> {
    let syn::PathArguments::AngleBracketed(arguments) = &segment.arguments else { return None };
    match arguments.args.first()? {
        syn::GenericArgument::Type(syn::Type::Path(t)) => Some(last_of(&t.path).ident.to_string()),
        _ => None,
    }
}

fn type_text(tokens: impl ToTokens) -> String {
    let text = tokens.to_token_stream().to_string().replace(' ', "");
    // Paths within types say where, which the page does not.
    let mut out = String::new();
    for part in text.split_inclusive(['<', '>', ',', '(', ')']) {
        let (name, end) = part.split_at(part.len() - usize::from(part.ends_with(['<', '>', ',', '(', ')'])));
        out.push_str(name.rsplit("::").next().unwrap_or(name));
        out.push_str(end);
    }
    out
}

impl<'ast> Visit<'ast> for Reader<'_> {
    fn visit_item_mod(&mut self, item: &'ast syn::ItemMod) {
        if item.ident != "tests" {
            visit::visit_item_mod(self, item);
        }
    }

    fn visit_item_impl(&mut self, item: &'ast syn::ItemImpl) {
        let subject = match &*item.self_ty {
            syn::Type::Path(t) => last_of(&t.path).ident.to_string(),
            _ => return,
        };
        if let Some((_, path, _)) = &item.trait_ {
            let segment = last_of(path);
            match segment.ident.to_string().as_str() {
                "Actor" => {
                    self.code.actors.insert(subject, self.module.clone());
                }
                "Handles" => {
                    self.code.handles.insert((subject, argument(segment).expect("Handles<Message>")));
                }
                "Message" => {
                    let reply = item.items.iter().find_map(|i| match i {
                        syn::ImplItem::Type(t) if t.ident == "Reply" => Some(type_text(&t.ty)),
                        _ => None,
                    });
                    self.code.replies.insert(subject, reply.expect("a message has a reply"));
                }
                _ => {}
            }
        }
        visit::visit_item_impl(self, item);
    }

    fn visit_type_path(&mut self, path: &'ast syn::TypePath) {
        let segment = last_of(&path.path);
        if segment.ident == "Port"
            && let Some(message) = argument(segment)
            && message != "M"
        {
            self.code.asks.insert((self.module.clone(), message));
        }
        visit::visit_type_path(self, path);
    }

    /// `query(&handle, || Message {})` in the wiring: DebugHttp asks.
    fn visit_expr_call(&mut self, call: &'ast syn::ExprCall) {
        if let syn::Expr::Path(f) = &*call.func
            && last_of(&f.path).ident == "query"
            && let Some(syn::Expr::Closure(closure)) = call.args.last()
            && let syn::Expr::Struct(message) = &*closure.body
        {
            self.code.asks.insert(("debug".to_owned(), last_of(&message.path).ident.to_string()));
        }
        visit::visit_expr_call(self, call);
    }

    /// cloud.rs declares its calls and handlers by two macros.
    fn visit_item_macro(&mut self, item: &'ast syn::ItemMacro) {
        let tokens: Vec<TokenTree> = item.mac.tokens.clone().into_iter().collect();
        if item.mac.path.is_ident("call") {
            let arrow = tokens.iter().rposition(|t| t.to_string() == ">").expect("call!(Name {…} -> Reply)");
            let arrow = tokens[..arrow]
                .iter()
                .rposition(|t| t.to_string() == "-")
                .filter(|at| tokens[at + 1].to_string() == ">")
                .unwrap_or(arrow - 1);
            let name = tokens[..arrow].iter().rev().find_map(|t| match t {
                TokenTree::Ident(i) => Some(i.to_string()),
                _ => None,
            });
            let reply: TokenStream = tokens[arrow + 2..].iter().cloned().collect();
            self.code.replies.insert(name.expect("call! names its message"), type_text(reply));
        } else if item.mac.path.is_ident("handles") {
            for pair in tokens.split(|t| t.to_string() == ",").filter(|p| !p.is_empty()) {
                self.code.handles.insert(("CloudApi".to_owned(), pair[0].to_string()));
            }
        }
    }
}

fn sources(dir: &Path, into: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        match path.is_dir() {
            true => sources(&path, into),
            false if path.extension().is_some_and(|e| e == "rs") => into.push(path),
            false => {}
        }
    }
}

fn read_code() -> Code {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    sources(&src, &mut files);
    let mut code = Code::default();
    for file in files {
        let inner = file.strip_prefix(&src).unwrap();
        let module = inner.iter().next().unwrap().to_string_lossy().trim_end_matches(".rs").to_owned();
        // The lab plays the outside; the actor layer is generic.
        if ["actor", "lab", "bench", "bin", "main"].contains(&module.as_str()) || file.ends_with("tests.rs") {
            continue;
        }
        let parsed = syn::parse_file(&std::fs::read_to_string(&file).unwrap()).unwrap();
        Reader { module, code: &mut code }.visit_file(&parsed);
    }
    code
}

/// The rows of the table under a heading, trimmed, without its head.
fn table(page: &str, heading: &str) -> Vec<Vec<String>> {
    let section =
        page.split(&format!("## {heading}\n")).nth(1).unwrap_or_else(|| panic!("actors.md has no {heading:?}"));
    let section = section.split("\n## ").next().unwrap();
    let rows = section.lines().filter(|l| l.starts_with('|')).skip(2);
    rows.map(|l| l.trim_matches('|').split('|').map(|c| c.trim().to_owned()).collect()).collect()
}

fn page() -> String {
    std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("actors.md")).unwrap()
}

#[test]
fn the_page_names_every_actor_and_no_other() {
    let told: BTreeSet<String> = table(&page(), "Actors").into_iter().map(|r| r[0].clone()).collect();
    let there: BTreeSet<String> = read_code().actors.into_keys().collect();
    assert_eq!(told, there);
    let page = page();
    let tree = page.split("```").nth(1).unwrap();
    for actor in &there {
        assert!(tree.contains(&format!("── {actor} ")), "the tree lacks {actor}");
    }
}

#[test]
fn the_page_has_every_message_with_its_reply() {
    let code = read_code();
    let told: BTreeSet<(String, String, String)> =
        table(&page(), "Messages").into_iter().map(|r| (r[0].clone(), r[1].clone(), r[2].clone())).collect();
    let there: BTreeSet<(String, String, String)> = code
        .handles
        .iter()
        .map(|(actor, message)| {
            let reply = code.replies.get(message).unwrap_or_else(|| panic!("{message} has no reply type"));
            (actor.clone(), message.clone(), reply.clone())
        })
        .collect();
    let missing: Vec<_> = there.difference(&told).collect();
    let stale: Vec<_> = told.difference(&there).collect();
    assert!(missing.is_empty() && stale.is_empty(), "missing on the page: {missing:?}\nnot in the code: {stale:?}");
}

#[test]
fn the_page_shows_who_asks_whom_and_nobody_asks_in_a_circle() {
    let code = read_code();
    let asker = |module: &str| {
        let actor = code.actors.iter().find(|(_, m)| *m == module).map(|(a, _)| a.clone());
        actor.unwrap_or_else(|| module.to_owned())
    };
    let there: BTreeSet<(String, String)> = code
        .asks
        .iter()
        .flat_map(|(module, message)| {
            let by = asker(module);
            code.handles.iter().filter(move |(_, m)| m == message).map(move |(actor, _)| (by.clone(), actor.clone()))
        })
        .collect();
    let told: BTreeSet<(String, String)> =
        table(&page(), "Who asks whom").into_iter().map(|r| (r[0].clone(), r[1].clone())).collect();
    assert_eq!(told, there);

    // Take away those who ask nobody that is left, until none is left.
    let mut edges = there;
    while !edges.is_empty() {
        let askers: BTreeSet<String> = edges.iter().map(|(a, _)| a.clone()).collect();
        let before = edges.len();
        edges.retain(|(_, of)| askers.contains(of));
        assert!(edges.len() < before, "they wait in a circle: {edges:?}");
    }
}
