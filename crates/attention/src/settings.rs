//! Settings that mechanisms share, written once: their keys, defaults and meanings, and the softmax attention that they describe.
//!
//! Serde's `flatten` would do the same, but refuses no misspelt keys and loses the place of a wrong value.

/// Declares the settings of a mechanism. `@window` and the like stand for shared settings, some with a meaning of their own;
/// `@flag` is one that is on or off; anything else is a field as in any struct. A last line `=> fn name` makes a method that gives
/// softmax attention with the same shared settings.
macro_rules! head_settings {
    ($(#[$meta:meta])* pub struct $Name:ident { $($fields:tt)* }) => {
        head_settings!(@ [$(#[$meta])* $Name] {} {} $($fields)*);
    };
    ($(#[$meta:meta])* pub struct $Name:ident { $($fields:tt)* } => fn $softmax:ident) => {
        head_settings!(@ [$(#[$meta])* $Name => $softmax] {} {} $($fields)*);
    };

    (@ $head:tt { $($done:tt)* } { $($shared:ident)* } @n_kv_heads, $($rest:tt)*) => {
        head_settings!(@ $head { $($done)* } { $($shared)* }
            @n_kv_heads "Key/value heads: n_heads gives MHA (the default), a divisor of it GQA, 1 MQA.", $($rest)*);
    };
    (@ $head:tt { $($done:tt)* } { $($shared:ident)* } @n_kv_heads $meaning:literal, $($rest:tt)*) => {
        head_settings!(@ $head { $($done)*
            #[doc = $meaning]
            #[serde(default, skip_serializing_if = "Option::is_none")]
            pub n_kv_heads: Option<usize>,
        } { $($shared)* n_kv_heads } $($rest)*);
    };
    (@ $head:tt { $($done:tt)* } { $($shared:ident)* } @head_dim, $($rest:tt)*) => {
        head_settings!(@ $head { $($done)*
            /// Channels of a head. Default: d_model / n_heads.
            #[serde(default, skip_serializing_if = "Option::is_none")]
            pub head_dim: Option<usize>,
        } { $($shared)* head_dim } $($rest)*);
    };
    (@ $head:tt { $($done:tt)* } { $($shared:ident)* } @window, $($rest:tt)*) => {
        head_settings!(@ $head { $($done)*
            /// Keys that a query sees: itself and those before it, in an encoder as many again behind it. A number, or a list with one
            /// per layer, with 0 for full attention. Default: full attention.
            #[serde(default, skip_serializing_if = "Option::is_none")]
            pub window: Option<$crate::PerLayerCount>,
        } { $($shared)* window } $($rest)*);
    };
    (@ $head:tt { $($done:tt)* } { $($shared:ident)* } @flag $flag:ident $meaning:literal, $($rest:tt)*) => {
        head_settings!(@ $head { $($done)*
            #[doc = $meaning]
            #[serde(default)]
            pub $flag: bool,
        } { $($shared)* $flag } $($rest)*);
    };
    (@ $head:tt { $($done:tt)* } $shared:tt $(#[$meta:meta])* pub $field:ident: $Type:ty, $($rest:tt)*) => {
        head_settings!(@ $head { $($done)* $(#[$meta])* pub $field: $Type, } $shared $($rest)*);
    };

    (@ [$(#[$meta:meta])* $Name:ident $(=> $softmax:ident)?] { $($fields:tt)* } $shared:tt) => {
        $(#[$meta])*
        #[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
        #[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
        #[serde(deny_unknown_fields)]
        pub struct $Name { $($fields)* }

        $(head_settings!(# $Name $softmax $shared);)?
    };
    (# $Name:ident $softmax:ident { $($shared:ident)* }) => {
        impl $Name {
            /// Softmax attention with the same settings.
            fn $softmax(&self) -> $crate::SoftmaxConfig {
                $crate::SoftmaxConfig {
                    n_heads: self.n_heads,
                    $($shared: self.$shared.clone(),)*
                    ..Default::default()
                }
            }
        }
    };
}
pub(crate) use head_settings;
